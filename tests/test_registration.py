"""Every op of csrc/library.cpp is complete: kernels for CPU and CUDA, a fake, autograd, and a Python name."""

import re
from pathlib import Path

import pytest
import torch

import entropy_rl_ext

LIBRARY = Path(__file__).parent.parent / "csrc" / "library.cpp"
OPS = sorted(set(re.findall(r'"(\w+)\(', LIBRARY.read_text())))
HAS_CUDA = bool(entropy_rl_ext.build_info()["cuda"]) and torch.version.cuda is not None


def has_kernel(op: str, key: str) -> bool:
    """Whether the op has a kernel for this key, or is written in terms of ops that are themselves checked."""
    name = f"entropy_rl::{op}"
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, k) for k in (key, "CompositeImplicitAutograd")
    )


def test_ops_were_found():
    assert {"token_entropy", "logprob_entropy", "global_top_mask", "policy_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "Autograd"])
def test_kernel_is_registered(op, key):
    if key == "CUDA" and not HAS_CUDA:
        pytest.skip("this build, or this torch, has no CUDA; make cuda-build runs this test on one that has")
    assert has_kernel(op, key), f"{op} has no {key} kernel"


PUBLIC = [
    "aggregate",
    "get_global_entropy_top_mask",
    "global_top_mask",
    "kl_loss",
    "logprob_entropy",
    "policy_loss",
    "token_entropy",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_wrapper_and_a_reference(name):
    assert name in entropy_rl_ext.__all__ and callable(getattr(entropy_rl_ext, name))
    assert callable(getattr(entropy_rl_ext.reference, name))
    assert getattr(entropy_rl_ext, name).__doc__
