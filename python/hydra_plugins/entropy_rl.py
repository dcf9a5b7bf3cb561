"""Adds the entropy_top_* keys to the configuration of `python -m verl.trainer.main_ppo`.

Hydra loads every module in hydra_plugins. This one puts a directory in front of verl's on the search path. Its actor
configurations extend verl's configurations of the same names, which they find as config/actor under verl.trainer.
"""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EntropyRLSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "verl" not in sys.modules:  # another application that uses Hydra
            return
        from entropy_rl.integrations.verl import plugin

        reason = plugin.unsupported_reason()
        if reason is not None:
            print(f"{reason}: actor_rollout_ref.actor.entropy_top_* are not available", file=sys.stderr)
            return
        search_path.prepend("entropy-rl-ext", "pkg://entropy_rl.integrations.verl.conf")
        search_path.append("entropy-rl-ext", "pkg://verl.trainer")
