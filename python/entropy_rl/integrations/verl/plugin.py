"""The `verl.plugins` entry point, which installs this package's `ppo_loss` and its check of a configuration in verl.

verl loads it in each of its processes and logs an exception at debug level only. Importing this module therefore never
raises: it stores the reason in `failure`, and `require` raises it when `entropy_top_ratio` is set.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from entropy_rl.integrations import missing_hook, warn_if_untested
from entropy_rl.integrations.verl import hooks

# Modules that bind ppo_loss by name when they are imported.
_USERS = ("verl.workers.utils.losses", "verl.workers.engine_workers", "verl.trainer.distillation.losses")

failure: str | None = None


def unsupported_reason() -> str | None:
    """Why this package does not work with the installed verl; None if it does."""
    return missing_hook("verl", hooks.LOSS)


def require() -> None:
    """Raises RuntimeError if verl would not call this package's loss in this process. Warns if verl is untested."""
    reason = failure or missing_hook("verl", hooks.engines())
    if reason is None:
        from entropy_rl.integrations.verl.loss import ppo_loss

        others = [name for name in _USERS if name in sys.modules and sys.modules[name].ppo_loss is not ppo_loss]
        if others:
            policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
            reason = (
                f"{' and '.join(others)} imported another ppo_loss; VERL_USE_EXTERNAL_PLUGINS={policy}, but it must "
                "be auto or name entropy_rl"
            )
    if reason is not None:
        raise RuntimeError(
            f"actor_rollout_ref.actor.entropy_top_ratio is set, but its loss could not be installed: {reason}"
        )
    warn_if_untested("verl")


def _with_check(validate_config: Callable[..., Any]) -> Callable[..., Any]:
    """verl's check of the whole configuration, which the driver makes before Ray starts, and this package's."""

    @functools.wraps(validate_config)
    def wrapped(config: Any, *arguments: Any, **options: Any) -> Any:
        from entropy_rl.integrations.verl.config import check_run

        result = validate_config(config, *arguments, **options)
        check_run(config)
        return result

    return wrapped


def _install() -> None:
    global failure
    try:
        failure = unsupported_reason()
        if failure is not None:
            return
        from verl.utils import config
        from verl.workers.utils import losses

        from entropy_rl.integrations.verl.loss import ppo_loss

        losses.ppo_loss = ppo_loss
        config.validate_config = _with_check(config.validate_config)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"


_install()
