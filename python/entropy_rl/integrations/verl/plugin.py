"""The `verl.plugins` entry point, which installs this package's `ppo_loss` in verl.

verl loads it in each of its processes and logs an exception at debug level only. Importing this module therefore never
raises: it stores the reason in `failure`, and `require` raises it when `entropy_top_ratio` is set.
"""

import os
import sys
from importlib.metadata import version

from entropy_rl.integrations import SUPPORTED, is_supported

# Modules that bind ppo_loss by name when they are imported.
_USERS = ("verl.workers.utils.losses", "verl.workers.engine_workers", "verl.trainer.distillation.losses")

failure: str | None = None


def unsupported_reason() -> str | None:
    """Why this package does not support the installed verl; None if it does."""
    installed = version("verl")
    if is_supported("verl", installed):
        return None
    return (
        f"entropy-rl-ext {version('entropy-rl-ext')} supports verl {SUPPORTED['verl']}.x; verl {installed} is installed"
    )


def require() -> None:
    """Raises RuntimeError if verl would not call this package's loss in this process."""
    reason = failure or unsupported_reason()
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


def _install() -> None:
    global failure
    failure = unsupported_reason()
    if failure is not None:
        return
    try:
        from verl.workers.utils import losses

        from entropy_rl.integrations.verl.loss import ppo_loss

        losses.ppo_loss = ppo_loss
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"


_install()
