"""Finds and loads the compiled libraries."""

import ctypes
import json
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).parent

# Why the CUDA kernels of this build are not loaded, although torch is a CUDA build; None if they are.
cuda_failure: str | None = None


def _find(name: str) -> Path | None:
    return next(iter(sorted(_HERE.glob(f"{name}.*.so")) + sorted(_HERE.glob(f"{name}.so"))), None)


def _cpu_library() -> Path:
    path = _find("_cpu")
    if path is None:
        raise ImportError(
            f"entropy_rl_ext is not built: no _cpu library in {_HERE}. "
            "Install it with `pip install --no-build-isolation -e .`"
        )
    return path


def load_libraries() -> None:
    """Registers `torch.ops.entropy_rl.*`: CPU kernels always, CUDA kernels where torch is a CUDA build.

    Warns if the CUDA kernels cannot be loaded. The ops then work on the CPU.
    """
    global cuda_failure
    torch.ops.load_library(_cpu_library())  # type: ignore[no-untyped-call]
    cuda = _find("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        cuda_failure = _load_cuda(cuda, torch.version.cuda)
        if cuda_failure is not None:
            warnings.warn(
                f"entropy_rl_ext works on the CPU only: {cuda_failure}; build it again with this torch and a CUDA "
                f"{torch.version.cuda} toolkit: pip install --no-build-isolation -e . in a clone of the package",
                stacklevel=3,
            )


def _load_cuda(path: Path, torch_cuda: str) -> str | None:
    """Loads the CUDA kernels. Returns one line that names both versions of CUDA if that fails."""
    built = build_info()["cuda"]
    reason = ""
    # With another major version the library's CUDA runtime is a second one in the process, or there is none.
    if built.split(".")[0] == torch_cuda.split(".")[0]:
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            return None
        except OSError as error:
            reason = f" ({error.__cause__ or error})"  # torch's own error names only the path
    return (
        f"its CUDA kernels were built for CUDA {built}, and torch {torch.__version__} is built for CUDA {torch_cuda}"
        f"{reason}"
    )


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
