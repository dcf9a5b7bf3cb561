"""The check of the compiler's report finds what it looks for."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import compile_report  # noqa: E402

RESOURCES = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function rows:
  REG:56 STACK:{stack} SHARED:1536 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
Fatbin elf code:
================
arch = sm_90

	code for sm_90
		Function : rows
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0010*/                   {load} R12, desc[UR8][R2.64] ;
        /*0020*/              @!P0 {local} R4, [R1] ;
"""


def kernel(name: str, stack: int = 0, load: str = "LDG.E.128", local: str = "LDS") -> compile_report.Kernel:
    [found] = compile_report.parse(RESOURCES.format(stack=stack), CODE.format(load=load, local=local))
    found.name = name
    return found


def test_reads_both_listings():
    found = kernel("logprob_entropy_kernel<float>")
    assert (found.architecture, found.registers, found.shared, found.stack) == ("sm_90", 56, 1536, 0)
    assert found.wide == {"LDG": 1, "STG": 0}
    assert found.problems() == []


@pytest.mark.parametrize("broken", [{"stack": 8}, {"local": "LDL"}, {"local": "STL.64"}])
def test_local_memory_is_a_problem(broken):
    [problem] = kernel("selection_cut_kernel<uint32>", **broken).problems()
    assert "selection_cut_kernel<uint32>: local memory" in problem


def test_narrow_loads_are_a_problem_of_row_kernels_alone():
    assert "no LDG.128" in kernel("logprob_entropy_kernel<float>", load="LDG.E.64").problems()[0]
    assert kernel("selection_cut_kernel<uint32>", load="LDG.E.64").problems() == []
    assert "no STG.128" in kernel("logprob_entropy_backward_kernel<float>").problems()[0]


def test_an_exception_has_a_size():
    name = "cub::DeviceSegmentedRadixSortKernel<x>"
    assert kernel(name, stack=8, local="LDL").problems() == []
    assert kernel(name, stack=16).problems() != []


def test_a_kernel_that_is_gone_is_missed():
    part = next(iter(compile_report.WIDE))
    found = [kernel("logprob_entropy_kernel<float>")]
    assert f"sm_90: no kernel named {part}" not in compile_report.missing(found)
    assert f"sm_80: no kernel named {part}" in compile_report.missing(found)


def test_the_page_lists_every_kernel_of_the_sources():
    """The page is up to date: it lists the kernels of the sources, and no others."""
    kernels = [re.findall(r"(\w+_kernel)\(", path.read_text()) for path in (ROOT / "csrc/kernels").glob("*.cuh")]
    page = (ROOT / "docs/cuda_kernels.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == {name for names in kernels for name in names}


def test_names_are_short():
    demangled = "void entropy_rl::selection_mask_kernel<entropy_rl::EntropyKeys<entropy_rl::Half> >(int, (x)1)"
    assert compile_report.short_name(demangled) == "selection_mask_kernel<EntropyKeys<Half> >"
