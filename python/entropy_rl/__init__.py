"""The training layer: RL on the highest-entropy tokens, from the command line. It stands on `entropy_rl_ext`."""
