"""Training on the highest-entropy tokens in verl: `actor_rollout_ref.actor.entropy_top_ratio` and the other keys.

plugin   the `verl.plugins` entry point; installs `loss.ppo_loss` in every process that imports verl
config   the actor configurations with the entropy_top_* keys; conf/ has their defaults
loss     verl's `ppo_loss` on the selected tokens
engine   changes to verl's engines: token counts, the selection of a mini-batch, log-probabilities and entropies
hooks    what these replace or call in verl
cpu      a platform and a rollout backend for machines without a GPU
"""
