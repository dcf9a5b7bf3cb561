"""The `verl.plugins` entry point. verl loads it in each of its processes, and logs a failure where nobody looks.

So it never raises: it notes why it could not install itself, and `require` raises that when the ratio is set.
"""

import os
import sys
from importlib.metadata import version

SUPPORTED = "0.9"

# Modules that bind ppo_loss by name when they are imported.
_USERS = ("verl.workers.utils.losses", "verl.workers.engine_workers", "verl.trainer.distillation.losses")

failure: str | None = None


def unsupported() -> str | None:
    """What to say about the installed verl where this package does not support it, else None."""
    installed = version("verl")
    if installed.split(".")[:2] == SUPPORTED.split("."):
        return None
    return f"entropy-rl-ext {version('entropy-rl-ext')} supports verl {SUPPORTED}.x; verl {installed} is installed"


def require() -> None:
    """Raises RuntimeError where verl would not call this package's loss in this process."""
    reason = failure or unsupported()
    if reason is None:
        from entropy_rl.integrations.verl.loss import ppo_loss

        others = [name for name in _USERS if name in sys.modules and sys.modules[name].ppo_loss is not ppo_loss]
        if others:
            policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
            reason = (
                f"{' and '.join(others)} have another ppo_loss than this package's; VERL_USE_EXTERNAL_PLUGINS={policy} "
                "(it must be auto or name entropy_rl)"
            )
    if reason is not None:
        raise RuntimeError(
            f"actor_rollout_ref.actor.entropy_top_ratio is set, but its loss could not be installed: {reason}"
        )


def _install() -> None:
    global failure
    failure = unsupported()
    if failure is not None:
        return
    try:
        from verl.workers.utils import losses

        from entropy_rl.integrations.verl.loss import ppo_loss

        losses.ppo_loss = ppo_loss
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"


_install()
