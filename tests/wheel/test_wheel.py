"""What `make wheel` leaves in dist/: one wheel for every Python and torch that the package names."""

import json
import platform
import re
import subprocess
import sys
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


def test_the_layout_of_hugging_faces_kernels(wheel: Path, tmp_path: Path) -> None:
    """The package is a stable-ABI variant as it is; only metadata.json is added. Loaded under the name in it."""
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
