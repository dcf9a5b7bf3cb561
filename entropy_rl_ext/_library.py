"""Finds and loads the compiled libraries."""

import ctypes
import json
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _find(name: str) -> Path | None:
    return next(iter(sorted(_HERE.glob(f"{name}.*.so")) + sorted(_HERE.glob(f"{name}.so"))), None)


def _cpu_library() -> Path:
    path = _find("_cpu")
    if path is None:
        raise ImportError(
            f"entropy_rl_ext is not built: no _cpu library in {_HERE}. Install it with `pip install -e .`"
        )
    return path


def load_libraries() -> None:
    """Registers `torch.ops.entropy_rl.*`: CPU kernels always, CUDA kernels where torch is a CUDA build."""
    torch.ops.load_library(_cpu_library())  # type: ignore[no-untyped-call]
    cuda = _find("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        torch.ops.load_library(cuda)  # type: ignore[no-untyped-call]


def build_info() -> dict[str, str]:
    """How the libraries were built, and which instruction set the CPU kernels use here.

    Returns:
        `version` of this package, the `torch` and `cuda` versions of the build ("" for a build without CUDA),
        `cuda_archs`, `compiler`, and `simd`: "avx512", "avx2" or "portable". The environment variable
        ENTROPY_RL_SIMD can choose a narrower instruction set than the processor has.
    """
    try:
        from . import _bindings  # type: ignore[attr-defined]

        text: str = _bindings.build_info_json()
    except ImportError:  # an abi3 wheel has no pybind11 module
        function = ctypes.CDLL(str(_cpu_library())).entropy_rl_build_info
        function.restype = ctypes.c_char_p
        text = function().decode()
    info: dict[str, str] = json.loads(text)
    path = ctypes.CDLL(str(_cpu_library())).entropy_rl_simd
    path.restype = ctypes.c_char_p
    info["simd"] = path().decode()
    return info
