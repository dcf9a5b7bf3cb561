"""After the other tests: every kernel of the library has run."""

import os
import re
from pathlib import Path

# Kernels that no test reaches, and why.
UNREACHED: dict[str, str] = {}


def kernels_of(folder: Path) -> set[str]:
    """The kernels of a library, by their mangled names, from its PTX."""
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    return {name for text in texts for name in re.findall(r"^\.(?:visible |weak )*\.entry (\w+)", text, re.MULTILINE)}


def test_every_kernel_ran() -> None:
    kernels = kernels_of(Path(os.environ["CUDAEMU_PTX"]))
    ran = {line.split()[0] for line in Path(os.environ["CUDAEMU_LAUNCHES"]).read_text().splitlines()}
    assert len(kernels) > 100
    missing = sorted(kernels - ran - UNREACHED.keys())
    assert not missing, f"{len(missing)} of {len(kernels)} kernels never ran:\n" + "\n".join(missing)
    assert not UNREACHED.keys() & ran, "these kernels run: take them from UNREACHED"
    assert UNREACHED.keys() <= kernels, "these kernels no longer exist: take them from UNREACHED"
