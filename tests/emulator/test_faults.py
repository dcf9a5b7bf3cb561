"""The emulator reports each fault of faults.cu, and nothing of the kernels without one."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import device
import pytest
import torch

SOURCE = Path(__file__).with_name("faults.cu")
ELEMENTS = 64

# What a report begins with.
FAULTS = {
    "writes_past_the_end": "OUT OF BOUNDS: global memory",
    "reads_before_the_start": "OUT OF BOUNDS: global memory",
    "reads_misaligned": "MISALIGNED",
    "reads_what_nobody_wrote": "UNINITIALISED: global memory",
    "reads_shared_that_nobody_wrote": "UNINITIALISED: shared memory",
    "writes_past_shared": "OUT OF BOUNDS",
    "races_in_global": "RACE: a write after a write in global memory",
    "races_between_blocks": "RACE: a write after a write in global memory",
    "misses_a_barrier": "RACE: a read after a write in shared memory",
    "misses_a_warp_barrier": "RACE: a read after a write in shared memory",
    "reads_what_atomics_write": "RACE: a read after an atomic in global memory",
    "shuffles_an_absent_lane": "COLLECTIVE: a shuffle reads lane 20",
    "shuffles_without_a_lane": "COLLECTIVE: the mask names lanes that have exited",
    "leaves_before_a_barrier": "BARRIER: 1 threads of the block have exited",
    "has_too_many_threads": "LAUNCH: invalid configuration",
    "has_too_much_shared": "LAUNCH: more shared memory than was asked for",
}
FAULTLESS = ["writes_each", "has_its_barrier", "has_its_warp_barrier", "adds_atomically", "shuffles_parted_lanes"]
FAULTLESS += ["waits_in_turn"]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("faults")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    architecture = ["-gencode", "arch=compute_90,code=compute_90", "-lineinfo"]
    library = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *architecture, *library, "-o", folder / "faults.so", SOURCE], check=True)
    subprocess.run([nvcc, *architecture, "-ptx", "-o", folder / "faults.ptx", SOURCE], check=True)
    device.emulator.cudaemu_load_ptx(str(folder / "faults.ptx").encode())
    return ctypes.CDLL(str(folder / "faults.so"))


@pytest.fixture(autouse=True)
def no_report_is_left() -> Iterator[None]:
    device.reports()
    yield
    device.reports()
    device.emulator.cudaGetLastError()


def launch(kernels: ctypes.CDLL, name: str, data: torch.Tensor) -> list[str]:
    """Runs a kernel as nvcc's host code does, and returns the emulator's reports."""
    getattr(kernels, f"launch_{name}")(ctypes.c_void_p(data.data_ptr()), ELEMENTS)
    return device.reports()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(kernels: ctypes.CDLL, name: str) -> None:
    make = torch.empty if name == "reads_what_nobody_wrote" else torch.zeros
    found = launch(kernels, name, make(ELEMENTS, dtype=torch.int32, device="cuda"))
    assert any(line.startswith(FAULTS[name]) for line in found), found
    assert all(name in line for line in found)


@pytest.mark.parametrize("name", FAULTLESS)
def test_a_right_kernel_is_not(kernels: ctypes.CDLL, name: str) -> None:
    assert launch(kernels, name, torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda")) == []


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", FAULTLESS)
def test_nor_in_any_order_of_threads(kernels: ctypes.CDLL, name: str, seed: int) -> None:
    device.configure(seed=seed)
    try:
        assert launch(kernels, name, torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda")) == []
    finally:
        device.configure()


def test_a_report_names_thread_and_line(kernels: ctypes.CDLL) -> None:
    (report,) = launch(kernels, "writes_past_the_end", torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda"))
    line = next(n for n, text in enumerate(SOURCE.read_text().splitlines(), 1) if "KERNEL(writes_past" in text)
    assert "block (0,0,0) of (1,1,1) thread (0,0,0) of (1,1,1)" in report
    assert f"faults.cu:{line}" in report


def test_results(kernels: ctypes.CDLL) -> None:
    data = torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda")
    launch(kernels, "has_its_barrier", data)
    assert data.tolist() == list(range(63, -1, -1))
    launch(kernels, "shuffles_parted_lanes", data)
    assert data[:32].tolist() == [lane ^ 16 for lane in range(32)]
    data.zero_()
    launch(kernels, "adds_atomically", data)
    assert data[0] == 128


@pytest.fixture
def short_patience() -> Iterator[None]:
    """Few instructions, after which a block has no end."""
    device.emulator.cudaemu_set_most_instructions(100_000)
    yield
    device.emulator.cudaemu_set_most_instructions(4_000_000_000)


@pytest.mark.usefixtures("short_patience")
def test_a_block_without_an_end(kernels: ctypes.CDLL) -> None:
    found = launch(kernels, "waits_forever", torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda"))
    assert found and found[0].startswith("HANGS"), found


@pytest.mark.usefixtures("short_patience")
def test_a_block_that_waits_for_one_that_has_not_started(kernels: ctypes.CDLL) -> None:
    device.configure(seed=1)
    try:
        found = launch(kernels, "waits_for_the_block_before", torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda"))
    finally:
        device.configure()
    assert found and found[0].startswith("HANGS"), found


def test_memory_of_another_device(kernels: ctypes.CDLL) -> None:
    data = torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda:1")
    assert launch(kernels, "writes_each", data)[0].startswith("WRONG DEVICE: a kernel on device 0")
    with torch.cuda.device(1):
        assert launch(kernels, "writes_each", data) == []
