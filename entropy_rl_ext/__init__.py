"""Fused entropy, selection and policy-loss ops for RL on the highest-entropy tokens.

The ops are `torch.ops.entropy_rl.*`; the functions here are their typed wrappers. `reference` holds a
plain-torch oracle of each.
"""

from ._library import build_info, load_libraries

load_libraries()

from . import reference  # noqa: E402
from .ops.aggregate import aggregate  # noqa: E402
from .ops.global_top_mask import get_global_entropy_top_mask, global_top_mask  # noqa: E402
from .ops.kl_loss import kl_loss  # noqa: E402
from .ops.linear_logprob_entropy import linear_logprob_entropy  # noqa: E402
from .ops.logprob_entropy import logprob_entropy  # noqa: E402
from .ops.policy_loss import policy_loss  # noqa: E402
from .ops.token_entropy import token_entropy  # noqa: E402

__version__: str = build_info()["version"]
__all__ = [
    "aggregate",
    "build_info",
    "get_global_entropy_top_mask",
    "global_top_mask",
    "kl_loss",
    "linear_logprob_entropy",
    "logprob_entropy",
    "policy_loss",
    "reference",
    "token_entropy",
]
