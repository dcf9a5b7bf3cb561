"""tests/gpu/run_all.sh, with stand-ins for the programs of a GPU machine."""

import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_sanitizers_see_each_tensor(tmp_path: Path) -> None:
    """Under torch's caching allocator compute-sanitizer sees large segments, in which most wrong accesses are valid."""
    for name, text in (("python", "exit 0"), ("compute-sanitizer", 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_PYTHON": "python", "OUT": str(tmp_path / "out")}
    command = [ROOT / "tests/gpu/run_all.sh", "sanitizers"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            log = archive.extractfile(f"results/{tool}.log")
            assert log and log.read().decode().startswith(f"1 --tool {tool} --error-exitcode 1 python tests/gpu/")
