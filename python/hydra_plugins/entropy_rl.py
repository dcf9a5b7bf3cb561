"""Lets `python -m verl.trainer.main_ppo` compose the entropy_top_* keys: Hydra loads what is in hydra_plugins.

A directory in front of verl's own holds actor configurations that extend those of the same name, which they find
under verl.trainer, as config/actor.
"""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EntropyRLSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "verl" not in sys.modules:  # another application of Hydra's
            return
        from entropy_rl.integrations.verl import plugin

        reason = plugin.unsupported_reason()
        if reason is not None:
            print(f"{reason}: actor_rollout_ref.actor.entropy_top_* are not available", file=sys.stderr)
            return
        search_path.prepend("entropy-rl-ext", "pkg://entropy_rl.integrations.verl.conf")
        search_path.append("entropy-rl-ext", "pkg://verl.trainer")
