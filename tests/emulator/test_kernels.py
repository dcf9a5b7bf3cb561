"""tests/gpu/sanitize.py runs every kernel of the library. CUDAEMU_LAUNCHES names the file with those that it ran."""

import os
import re
from pathlib import Path

# Kernels that nothing launches, and why. Patterns of mangled names.
UNREACHED = {r"\w*EmptyKernel\w*": "CUB reads the attributes of this kernel to learn the architecture"}


def kernels_of(folder: Path) -> set[str]:
    """The kernels of a library, by their mangled names, from its PTX."""
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    return {name for text in texts for name in re.findall(r"^\.(?:visible |weak )*\.entry (\w+)", text, re.MULTILINE)}


def test_every_kernel_ran() -> None:
    kernels = kernels_of(Path(os.environ["CUDAEMU_PTX"]))
    ran = {line.split()[0] for line in Path(os.environ["CUDAEMU_LAUNCHES"]).read_text().splitlines()}
    assert len(kernels) > 100
    unreached = {name for name in kernels if any(re.fullmatch(pattern, name) for pattern in UNREACHED)}
    missing = sorted(kernels - ran - unreached)
    assert not missing, f"{len(missing)} of {len(kernels)} kernels never ran:\n" + "\n".join(missing)
    assert len(unreached) == len(UNREACHED), "a kernel of UNREACHED is not in the library"
    assert not unreached & ran, "a kernel of UNREACHED runs"
