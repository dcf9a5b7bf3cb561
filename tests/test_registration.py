"""Every op of csrc/library.cpp is complete: kernels for CPU and CUDA, a fake, autograd, and a Python name."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import entropy_rl_ext.reference

LIBRARY = Path(__file__).parent.parent / "csrc" / "library.cpp"
OPS = sorted(set(re.findall(r'"(\w+)\(', LIBRARY.read_text())))
HAS_CUDA = bool(entropy_rl_ext.build_info()["cuda"]) and torch.version.cuda is not None


def has_kernel(op: str, key: str) -> bool:
    """Whether the op has a kernel for this key, or is written in terms of ops that are themselves checked."""
    name = f"entropy_rl::{op}"
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, k) for k in (key, "CompositeImplicitAutograd"))


def test_ops_were_found():
    assert {"token_entropy", "logprob_entropy", "global_top_mask", "policy_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "Autograd"])
def test_kernel_is_registered(op, key):
    if key == "CUDA" and not HAS_CUDA:
        pytest.skip("this build, or this torch, has no CUDA; make cuda-build runs this test on one that has")
    assert has_kernel(op, key), f"{op} has no {key} kernel"


PUBLIC = sorted(set(entropy_rl_ext.__all__) - {"build_info"})


def test_public_ops_are_exported():
    """Ops whose schemas are steps of another are not public."""
    steps = re.compile(r"_(tile_)?(forward|backward)$|_(counts|key|next_key|at_key)$")
    assert {op for op in OPS if not steps.search(op)} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_wrapper_and_a_reference(name):
    assert name in entropy_rl_ext.__all__ and callable(getattr(entropy_rl_ext, name))
    assert callable(getattr(entropy_rl_ext.reference, name))
    assert getattr(entropy_rl_ext, name).__doc__


@pytest.mark.skipif(not HAS_CUDA, reason="this build, or this torch, has no CUDA; make cuda-build runs this test")
def test_cuda_library_holds_machine_code_and_ptx():
    """Machine code for each architecture of setup.py, and PTX for what comes after, of every kernel file."""
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:  # Triton, which comes with a CUDA build of torch, carries one
        spec = find_spec("triton")
        assert spec is not None and spec.origin is not None, "neither a CUDA toolkit's cuobjdump nor Triton's was found"
        cuobjdump = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    library = next(Path(entropy_rl_ext.__file__).parent.glob("_cuda*.so"))

    def listed(option: str) -> str:
        return subprocess.run([cuobjdump, option, library], check=True, capture_output=True, text=True).stdout

    elf, ptx = listed("--list-elf"), listed("--list-ptx")
    for source in LIBRARY.parent.glob("cuda/*.cu"):
        for architecture in ("sm_80", "sm_90", "sm_100", "sm_120"):
            assert f"{source.stem}.{architecture}.cubin" in elf
        assert f"{source.stem}.sm_90.ptx" in ptx
