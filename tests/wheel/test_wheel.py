"""What `make wheel` leaves in dist/: one wheel for every Python and torch that the package names."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel() -> Path:
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


def test_name(wheel: Path) -> None:
    assert re.fullmatch(r"entropy_rl_ext-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "entropy_rl_ext", "python"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    missing = {name.removeprefix("python/") for name in tracked} - names
    assert not missing
    assert "entropy_rl_ext/_cpu.abi3.so" in names
    assert not any("_bindings" in name for name in names), "pybind11 cannot be built against the limited API"


def test_libraries_need_nothing_of_torchs_cpp_api(wheel: Path, tmp_path: Path) -> None:
    """The stable ABI is C: an undefined C++ symbol of torch would tie the wheel to one version."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    libraries = list(tmp_path.rglob("*.so"))
    assert libraries
    for library in libraries:
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", "--demangle", library], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
        assert "aoti_torch_call_dispatcher" in listed or "torch_call_dispatcher" in listed, "no call of the stable ABI"
        assert not [name for name in symbols if re.search(r"\b(?:at|c10|torch|caffe2)::", name)]
