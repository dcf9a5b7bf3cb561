"""Fused entropy, selection and policy-loss ops for RL on the highest-entropy tokens.

The ops are `torch.ops.entropy_rl.*`; the functions here are their typed wrappers. `entropy_rl_ext.reference`, to be
imported by itself, has each of them in plain torch and float64 for comparison.
"""

from ._library import build_info, load_libraries

load_libraries()

from .ops.aggregate import aggregate  # noqa: E402
from .ops.covariance_mask import covariance_mask  # noqa: E402
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
    "covariance_mask",
    "get_global_entropy_top_mask",
    "global_top_mask",
    "kl_loss",
    "linear_logprob_entropy",
    "logprob_entropy",
    "policy_loss",
    "token_entropy",
]
