"""House rules that a reader relies on: dependencies point one way, and an op has its file in every room."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc/kernels").iterdir())
CUDA = sorted((ROOT / "csrc/cuda").iterdir())
EXTENSION = sorted((ROOT / "entropy_rl_ext").rglob("*.py"))

ROOMS = (
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "csrc/kernels/{}.*h",  # its kernels, or what it brings to kernels that it shares
    "entropy_rl_ext/ops/{}.py",
    "tests/ops/test_{}.py",
    "tests/cpp/test_{}.cpp",
    "benchmarks/bench_{}.py",
)


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
    """Ops of the schema block; those that are steps of another are counted to that one."""
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text())
    return sorted(
        {re.sub(r"(_tile)?_(forward|backward)$|_(counts|key|next_key|at_key)$", "", name) for name in schemas}
    )


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


@pytest.mark.parametrize("source", EXTENSION, ids=lambda path: str(path.relative_to(ROOT)))
def test_op_library_never_imports_training_layer(source: Path) -> None:
    assert "entropy_rl" not in imported(source)


def test_instruction_sets_are_chosen_in_one_place() -> None:
    """A loop compiled for an instruction set by other means would not follow ENTROPY_RL_SIMD."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    named = {path.name for path in sources if re.search(r"\btarget(_clones)?\s*\(", path.read_text())}
    assert named == {"each_simd.h"}


def test_schema_block_is_found() -> None:
    assert "token_entropy" in ops()


@pytest.mark.parametrize("op", ops())
def test_op_has_its_file_in_every_room(op: str) -> None:
    missing = [room.format(op) for room in ROOMS if not any(ROOT.glob(room.format(op)))]
    assert not missing, f"{op} lacks {', '.join(missing)}"
