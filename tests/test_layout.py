"""House rules that a reader relies on: dependencies point one way, and an op has its file in every room."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
KERNELS = sorted((ROOT / "csrc/kernels").iterdir())
CUDA = sorted((ROOT / "csrc/cuda").iterdir())
EXTENSION = sorted((ROOT / "entropy_rl_ext").rglob("*.py"))

# The files that only one op has.
PYTHON_ROOMS = ("entropy_rl_ext/ops/{}.py", "tests/ops/test_{}.py")
KERNEL_ROOMS = (
    "csrc/ops/{}.h",
    "csrc/kernels/{}*.*h",  # its kernels, or its maths for kernels that it shares
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "tests/cpp/test_{}.cpp",
)
# The files that all ops share.
SHARED = ("csrc/library.cpp", "entropy_rl_ext/__init__.py", "entropy_rl_ext/reference.py")
STEPS = r"(_tile)?_(forward|backward)$|_(counts|key|next_key|at_key)$"


def included(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source.read_text(), flags=re.MULTILINE)


def imported(source: Path) -> set[str]:
    """Top-level packages that a Python file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def ops() -> list[str]:
    """Ops of the schema block, without those that are steps of another."""
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text())
    return sorted({re.sub(STEPS, "", name) for name in schemas})


def ops_with_kernels() -> list[str]:
    """Ops that register kernels; the others, written in Python, call the kernels of these."""
    sources = (path.read_text() for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    registered = {name for source in sources for name in re.findall(r'm\.impl\(\s*"(\w+)"', source)}
    return sorted({re.sub(STEPS, "", name) for name in registered})


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_include_no_framework(source: Path) -> None:
    """A kernel file includes its neighbours, the C++ library and CUDA's own headers, nothing else."""
    for name in included(source):
        neighbour = (source.parent / name).is_file()
        standard = re.fullmatch(r"[a-z_]+", name) is not None
        assert neighbour or standard or name.startswith("cuda_"), f"{source.name} includes {name}"


@pytest.mark.parametrize("source", CUDA, ids=lambda path: path.name)
def test_cuda_sources_include_no_aten(source: Path) -> None:
    """ATen headers would make a .cu compile five times as long and tie it to one version of torch."""
    for name in included(source):
        assert not name.startswith(("ATen/", "c10/", "torch/extension.h")), f"{source.name} includes {name}"


def test_shared_checks_include_no_backend() -> None:
    """csrc/ops is below the backends: it includes csrc/kernels, and neither csrc/cpu nor csrc/cuda."""
    for source in (ROOT / "csrc/ops").iterdir():
        for name in included(source):
            assert not name.startswith(("../cpu/", "../cuda/", "cuda")), f"{source.name} includes {name}"


def test_tensors_are_made_in_one_place() -> None:
    """torch's own functions lose its message, that of a lack of memory for instance."""
    makes = re.compile(r"torch::stable::(new_empty|new_zeros|empty_like|contiguous|to|clone)\(")
    assert [path.name for path in CSRC if makes.search(path.read_text())] == ["new_tensor.h"]


def test_file_names_of_csrc_are_unique() -> None:
    names = Counter(path.name for path in CSRC)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("source", EXTENSION, ids=lambda path: str(path.relative_to(ROOT)))
def test_op_library_never_imports_training_layer(source: Path) -> None:
    assert "entropy_rl" not in imported(source)


def test_instruction_sets_are_chosen_in_one_place() -> None:
    """A loop compiled for an instruction set by other means would not follow ENTROPY_RL_SIMD."""
    named = {path.name for path in CSRC if re.search(r"\btarget(_clones)?\s*\(", path.read_text())}
    assert named == {"each_simd.h"}


def test_ops_are_found() -> None:
    assert "token_entropy" in ops()
    assert set(ops()) - set(ops_with_kernels()) == {"token_entropy"}


@pytest.mark.parametrize("op", ops())
def test_op_has_its_file_in_every_room(op: str) -> None:
    rooms = PYTHON_ROOMS + (KERNEL_ROOMS if op in ops_with_kernels() else ())
    missing = [room.format(op) for room in rooms if not any(ROOT.glob(room.format(op)))]
    assert not missing, f"{op} lacks {', '.join(missing)}"


def test_adding_an_op_lists_every_file() -> None:
    """The table of docs/adding_an_op.md has the files of kl_loss, its pattern, one in each room, and no others."""
    page = (ROOT / "docs/adding_an_op.md").read_text()
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \|", page, flags=re.MULTILINE)
    listed = set(rows)
    assert all((ROOT / path).is_file() for path in listed), listed
    for room in PYTHON_ROOMS + KERNEL_ROOMS:
        matching = {str(path.relative_to(ROOT)) for path in ROOT.glob(room.format("kl_loss"))}
        assert listed & matching, f"the page lacks {room}"
    assert len(listed) == len(rows) == len(PYTHON_ROOMS + KERNEL_ROOMS + SHARED)
    assert listed >= set(SHARED)
