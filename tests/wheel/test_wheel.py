"""The files that `make wheel` writes to dist/: the sdist, and one wheel for each Python and torch that the package
supports."""

import json
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel() -> Path:
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_wheel_has_a_tag_that_indexes_accept(wheel: Path) -> None:
    """PyPI refuses linux_x86_64. torch's own wheels are manylinux_2_28."""
    tag = re.fullmatch(r"entropy_rl_ext-[\d.]+-cp310-abi3-(manylinux_[\w.]+)\.whl", wheel.name)
    assert tag and tag[1].endswith(platform.machine())


def test_sdist_holds_every_source() -> None:
    """The CUDA sources, too, although `make wheel` runs with a CPU build of torch. The wheel is built from it."""
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = tracked("csrc", "entropy_rl_ext", "python")
    assert any(name.endswith(".cu") for name in sources) and any(name.endswith(".cuh") for name in sources)
    assert not sources - names
    assert names >= {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {name.removeprefix("python/") for name in tracked("entropy_rl_ext", "python")} - names
    assert not missing
    assert "entropy_rl_ext/_cpu.abi3.so" in names
    assert not any("_bindings" in name for name in names), "pybind11 cannot be built against the limited API"
    assert not any("_cuda" in name for name in names), "built with CUDA: a release has the CPU kernels alone"


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(wheel).extractall(directory)
    found = list(directory.rglob("*.so*"))
    assert found
    return found


def test_wheel_brings_no_library_of_another_package(libraries: list[Path]) -> None:
    """A second copy of torch's or CUDA's libraries in a process would not share their state."""
    assert {library.name for library in libraries} == {"_cpu.abi3.so"}


def test_libraries_are_stripped(libraries: list[Path]) -> None:
    for library in libraries:
        sections = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
        assert ".debug_info" not in sections and ".symtab" not in sections


def test_libraries_need_nothing_of_torchs_cpp_api(libraries: list[Path]) -> None:
    """The stable ABI is C: an undefined C++ symbol of torch would tie the wheel to one version of it."""
    for library in libraries:
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", "--demangle", library], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
        assert "aoti_torch_call_dispatcher" in listed or "torch_call_dispatcher" in listed, "no call of the stable ABI"
        assert not [name for name in symbols if re.search(r"\b(?:at|c10|torch|caffe2)::", name)]


def test_the_layout_of_hugging_faces_kernels(wheel: Path, tmp_path: Path) -> None:
    """With a metadata.json, the unmodified package is a stable-ABI variant; it loads under the name given there."""
    variant = tmp_path / "build" / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    variant.parent.mkdir()
    (tmp_path / "wheel/entropy_rl_ext").rename(variant)
    metadata = {"id": "_entropy_rl_ext_cpu_1", "name": "entropy-rl-ext", "version": 1, "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"license": "Apache-2.0", "python-depends": []}))
    program = (
        "from pathlib import Path\n"
        "import sys, torch\n"
        "from kernels import get_local_kernel\n"
        f"kernel = get_local_kernel(Path({str(tmp_path)!r}), backend='cpu')\n"
        "assert kernel.__name__ == '_entropy_rl_ext_cpu_1' and 'entropy_rl_ext' not in sys.modules\n"
        "x = torch.randn(4, 100)\n"
        "torch.testing.assert_close(kernel.token_entropy(x), torch.distributions.Categorical(logits=x).entropy())\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "build/kernels")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
