"""The CPU loops of every op, on every instruction set that this processor has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import entropy_rl_ext

HERE = Path(__file__).parent
PATHS = ("portable", "avx2", "avx512")
# build_info() names the widest unless the variable is set.
NARROWER = PATHS[: PATHS.index(entropy_rl_ext.build_info()["simd"])]
NO_LOOPS = ("test_simd.py", "test_reference.py", "test_autograd.py", "test_arguments.py")
OPS = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in NO_LOOPS)


def run(path: str, *command: str) -> subprocess.CompletedProcess[str]:
    # One thread: the loops do not depend on the number of threads, which the tests of the widest path cover.
    environment = os.environ | {"ENTROPY_RL_SIMD": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=HERE, capture_output=True, text=True)


@pytest.mark.parametrize("path", NARROWER)
def test_variable_chooses_the_path(path: str) -> None:
    code = "import json, entropy_rl_ext; print(json.dumps(entropy_rl_ext.build_info()))"
    assert json.loads(run(path, "-c", code).stdout)["simd"] == path


@pytest.mark.parametrize("path", NARROWER)
def test_narrower_path_passes_the_tests_of_the_widest(path: str) -> None:
    # Registration, compilation, the split over ranks and the memory of large gradients do not depend on the loops.
    chosen = ("-k", "not compile and not opcheck and not large_gradient", "-m", "not ranks")
    tests = run(path, "-m", "pytest", "-q", "-x", *OPS, *chosen)
    assert tests.returncode == 0, tests.stdout[-3000:]


def test_unknown_path_is_refused() -> None:
    code = "import torch, entropy_rl_ext; entropy_rl_ext.token_entropy(torch.zeros(1, 8))"
    result = run("sse9", "-c", code)
    assert result.returncode != 0
    assert "ENTROPY_RL_SIMD is sse9; it must be portable, avx2 or avx512" in result.stderr
