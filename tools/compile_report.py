"""Reads what the compiler made of every CUDA kernel, and fails where a rule is broken.

    python tools/compile_report.py path/to/_cuda.abi3.so [--markdown docs/cuda_kernels.md]

No kernel may use local memory (spilled registers, arrays indexed at run time). Kernels that stream data must load 16
bytes at a time, and also store 16 bytes at a time if they write as much as they read. Needs cuobjdump, from the CUDA
toolkit or from Triton, which torch's CUDA builds depend on.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

# Kernels that must move 16 bytes at a time: pattern of the name -> instructions that must be there. Kernels over keys
# and tokens do so for elements of 4 bytes and more.
WIDE = {
    r"logprob_entropy_kernel": ("LDG",),
    r"softmax_parts_kernel": ("LDG",),
    r"logprob_entropy_backward_kernel": ("LDG", "STG"),
    r"linear_logprob_entropy_tile_kernel": ("LDG",),
    r"linear_logprob_entropy_tile_backward_kernel<float, \w+>": ("LDG",),
    r"radix_(segment|histogram|mask|counts|next_key)_kernel<EntropyKeys<(float|double)>": ("LDG",),
    r"token_loss_kernel": ("LDG", "STG"),
    r"scale_rows_kernel<(float|double)>": ("LDG", "STG"),
}

# (architecture, pattern of the name) -> bytes of stack that a kernel may use. CUB sorts the 64-bit keys of float64
# entropies; sm_120 has few units for float64 arithmetic, so a spill costs the float64 backward nothing.
MAY_SPILL = {
    ("sm_90", "DeviceSegmentedRadixSortKernel"): 8,
    ("sm_100", "DeviceRadixSortOnesweepKernel"): 24,
    ("sm_120", "linear_logprob_entropy_tile_backward_kernel<double, double>"): 16,
}


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local_instructions: int = 0
    wide: dict[str, int] = field(default_factory=lambda: {"LDG": 0, "STG": 0})

    def problems(self) -> list[str]:
        found = []
        allowed = max((size for (arch, part), size in MAY_SPILL.items() if self.is_kind(part, arch)), default=0)
        if self.stack > allowed or (self.local_instructions > 0 and allowed == 0):
            found.append(f"local memory: {self.stack} bytes of stack, {self.local_instructions} LDL/STL")
        for part, instructions in WIDE.items():
            if self.is_kind(part):
                found += [f"no {name}.128" for name in instructions if self.wide[name] == 0]
        return [f"{self.architecture} {self.name}: {problem}" for problem in found]

    def is_kind(self, part: str, architecture: str | None = None) -> bool:
        return re.search(rf"\b{part}(?!\w)", self.name) is not None and architecture in (None, self.architecture)


PAGE = """# What the compiler made of the CUDA kernels

`make cuda-build` writes this page (`tools/compile_report.py`). It fails if a kernel uses local
memory, or if a kernel that streams data has no 16-byte load or store. The first rule also applies to
CUB's kernels, which are not listed. A row stands for all variants of a kernel (dtype, loss, source
of keys): registers, shared memory and stack are the maximum over the variants, 16-byte accesses the
minimum. That minimum is 0 for a kernel with a variant for 2-byte elements.

"""


def readable(mangled: list[str]) -> dict[str, str]:
    """Mangled names -> kernel<template arguments>."""
    output = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {name: short_name(line) for name, line in zip(mangled, output.splitlines(), strict=True)}


def short_name(demangled: str) -> str:
    """Without return type, namespaces and the parameter list."""
    name = demangled.removeprefix("void ").replace("entropy_rl::", "").replace("unsigned int", "uint32")
    name = name.replace("unsigned long long", "uint64").replace("unsigned long", "uint64")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\bcub::\w+::detail::\w+::", "cub::", name).strip()


def by_architecture(output: str) -> Iterator[tuple[str, str]]:
    """(architecture, line) of cuobjdump's listings."""
    architecture = ""
    for line in output.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line.strip()):
            architecture = match[1]
        yield architecture, line


def parse(resources: str, code: str) -> list[Kernel]:
    """Kernels of `cuobjdump -res-usage` and `cuobjdump -sass`, under their mangled names."""
    kernels: dict[tuple[str, str], Kernel] = {}
    name = ""
    for architecture, line in by_architecture(resources):
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+(?:\[0\])?):(\d+)", line)}
            kernels[architecture, name] = Kernel(
                name, architecture, values["REG"], values["STACK"], values.get("SHARED", 0)
            )
    for architecture, line in by_architecture(code):
        if match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif (architecture, name) in kernels and (match := re.search(r"\b(LDL|STL|LDG|STG)\b([.\w]*)", line)):
            kernel = kernels[architecture, name]
            if match[1] in ("LDL", "STL"):
                kernel.local_instructions += 1
            elif ".128" in match[2]:
                kernel.wide[match[1]] += 1
    return list(kernels.values())


def missing(kernels: list[Kernel]) -> list[str]:
    """Rules that apply to no kernel: a renamed kernel must not escape its rule."""
    return [
        f"{architecture}: no kernel named {part}"
        for architecture in ARCHITECTURES
        for part in WIDE
        if not any(kernel.is_kind(part, architecture) for kernel in kernels)
    ]


def markdown(kernels: list[Kernel]) -> str:
    lines = [
        "| kernel | architecture | variants | registers | shared bytes | stack | 16-byte loads | 16-byte stores |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        families.setdefault((kernel.name.split("<")[0], kernel.architecture), []).append(kernel)
    for (name, architecture), family in sorted(families.items()):
        most = [max(getattr(kernel, field) for kernel in family) for field in ("registers", "shared", "stack")]
        fewest = [min(kernel.wide[instruction] for kernel in family) for instruction in ("LDG", "STG")]
        cells = [f"`{name}`", architecture, len(family), *most, *fewest]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def find_cuobjdump() -> str:
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for path in candidates:
        if path and Path(path).is_file():
            return path
    sys.exit("compile_report: no cuobjdump, neither of a CUDA toolkit nor of Triton")


def dump(library: Path, option: str) -> str:
    return subprocess.run([find_cuobjdump(), option, str(library)], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="the compiled CUDA library")
    parser.add_argument("--markdown", type=Path, help="write a table of the kernels here")
    arguments = parser.parse_args()
    kernels = parse(dump(arguments.library, "-res-usage"), dump(arguments.library, "-sass"))
    names = readable([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    if arguments.markdown:
        arguments.markdown.write_text(PAGE + markdown([kernel for kernel in kernels if "cub::" not in kernel.name]))
    problems = missing(kernels) + [problem for kernel in kernels for problem in kernel.problems()]
    print(f"compile_report: {len(kernels)} kernels, {len(problems)} problems")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
