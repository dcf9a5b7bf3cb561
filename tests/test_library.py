"""The compiled libraries: where the CUDA kernels cannot be loaded, the ops work on the CPU."""

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import entropy_rl_ext
from entropy_rl_ext import _library

FIX = "pip install --no-build-isolation -e . in a clone of the package"


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for CUDA 13.0, as far as the loader sees."""
    info = entropy_rl_ext.build_info() | {"cuda": "13.0"}
    monkeypatch.setattr(_library, "build_info", lambda: info)
    monkeypatch.setattr(_library, "cuda_failure", None)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A shared library that needs another, which is not there."""
    compiler = shutil.which("gcc") or shutil.which("c++")
    assert compiler
    missing, library = tmp_path / "libnowhere.so.13", tmp_path / "_cuda.abi3.so"
    shared = [compiler, "-shared", "-fPIC", "-x", "c"]
    (tmp_path / "runtime.c").write_text("int cudaRuntimeGetVersion(int *v) { return *v = 0; }\n")
    (tmp_path / "kernels.c").write_text(
        "int cudaRuntimeGetVersion(int *);\nint f(int *v) { return cudaRuntimeGetVersion(v); }\n"
    )
    subprocess.run([*shared, "runtime.c", f"-Wl,-soname,{missing.name}", "-o", missing], cwd=tmp_path, check=True)
    command = [*shared, "kernels.c", "-x", "none", missing, "-o", library]
    subprocess.run(command, cwd=tmp_path, check=True)
    missing.unlink()
    return library


def load(library: Path, torch_cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `import entropy_rl_ext` warns about if `library` has the CUDA kernels."""
    find = _library._find
    monkeypatch.setattr(_library, "_find", lambda name: library if name == "_cuda" else find(name))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library.load_libraries()
    logits = torch.randn(2, 5)
    torch.testing.assert_close(
        entropy_rl_ext.token_entropy(logits), torch.distributions.Categorical(logits=logits).entropy()
    )
    return [str(warning.message) for warning in caught]


def test_torch_of_another_cuda_major(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not even opened: a libcudart.so.13 of the system would be a second runtime beside torch's."""
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: pytest.fail(f"opened {path}"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: path != library or pytest.fail(f"opened {path}"))
    [warning] = load(library, "12.8", monkeypatch)
    assert warning == (
        f"entropy_rl_ext works on the CPU only: its CUDA kernels were built for CUDA 13.0, and torch "
        f"{torch.__version__} is built for CUDA 12.8; build it again with this torch and a CUDA 12.8 toolkit: {FIX}"
    )
    assert _library.cuda_failure and _library.cuda_failure in warning


def test_library_that_cannot_be_loaded(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [warning] = load(library, "13.2", monkeypatch)
    assert "were built for CUDA 13.0, and torch" in warning and "is built for CUDA 13.2 (libnowhere.so.13: " in warning
    assert FIX in warning and "\n" not in warning


def test_torch_without_cuda(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(library, None, monkeypatch) == []
    assert _library.cuda_failure is None
