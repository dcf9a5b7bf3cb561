"""Times our ops and their peers side by side: in one process, alternating, with the same fresh inputs.

A `bench_<op>.py` yields cases; `run_case` times one of them. On CUDA, events on the stream measure the time, and the
GPU sleeps while the host queues the call; on the CPU, a wall clock. A sweep empties the caches before every timed call,
so that inputs come from memory as in training.
"""

import ctypes
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_rl_ext

Inputs = dict[str, Tensor]
ROOT = Path(__file__).parent.parent
_MADV_PAGEOUT = 21  # of Linux
PEER_PACKAGES = ("verl", "trl", "liger-kernel", "quack-kernels", "transformers", "triton")


@dataclass(frozen=True)
class Case:
    """One row of a table: our op and its peers on one kind of input.

    A contender is a function of the inputs. It returns everything that must stay alive until the clock stops. Peers
    import their packages inside the function: a peer that cannot be imported, or fails, is listed with its error.
    """

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    bytes: int  # the fewest that must be read from and written to memory
    # Least ratio of a peer's time to ours; "copy": least share of a copy's bandwidth; "seconds": our longest time.
    goals: dict[str, float] = field(default_factory=dict)
    backward: bool = False  # whether contenders also run the backward
    graph: bool = False  # on CUDA: capture once, and time the replay
    # Measure each contender's memory in a separate process, in its second call, so that none finds memory that another
    # left behind. `inputs` and contenders must be picklable.
    peak_in_own_process: bool = False


@dataclass(frozen=True)
class InOwnProcess:
    """A contender that needs a process of its own, because it changes what others would do in the same one.

    It must be picklable, and nothing that it returns is kept. Where its memory is measured, which is in a process of
    its own anyway, it runs in that one.
    """

    contender: Callable[..., Any]

    def __call__(self, **inputs: Tensor) -> None:
        if multiprocessing.parent_process() is None:
            _process_of(self).submit(_run_in_process, self.contender, torch.get_num_threads(), inputs).result()
        else:
            self.contender(**inputs)


@cache
def _process_of(contender: InOwnProcess) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run_in_process(contender: Callable[..., Any], threads: int, inputs: Inputs) -> None:
    torch.set_num_threads(threads)
    contender(**inputs)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled again for each case.

    The first call raises ValueError if its result is far from that of `function`: torch 2.13, restricted to AVX2 on a
    processor with AVX-512 (ATEN_CPU_CAPABILITY=avx2), compiles losses that give NaN in next to no time.
    """

    @cache
    def compile_once() -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    checked = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        result = compile_once()(*args, **kwargs)
        if not checked:
            with torch.no_grad():
                expected = function(*args, **kwargs)
            if not _similar(result, expected):
                raise ValueError("torch.compile gives another result than the function")
            checked = True
        return result

    return run


def _similar(result: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> bool:
    """Whether results differ by a tenth or less on average: rounding, ties and random choices may differ."""
    if isinstance(expected, tuple):
        return all(_similar(one, other) for one, other in zip(result, expected, strict=True))
    assert isinstance(result, Tensor)
    return bool((result.double() - expected.double()).abs().mean() <= 0.1 * expected.double().abs().mean())


# --- measuring -----------------------------------------------------------------------------------


_SLEEP_CYCLES = 1 << 22  # 2 ms of a GPU at 2 GHz
_LONGER = 4
_ATTEMPTS = 3


@cache
def _sweep_buffer(device: str) -> Tensor:
    return torch.zeros(64 << 20, dtype=torch.float32, device=device)  # more than any cache holds


def _sweep(device: str) -> None:
    """Fills the caches with other data. It reads: lines that it wrote would go to memory while the call is timed."""
    _sweep_buffer(device).sum()


def _timed(call: Callable[[], Any], device: str) -> float:
    """Seconds that one call takes with cold caches."""
    if device == "cuda":
        return _timed_on_gpu(call)
    _sweep(device)
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def _timed_on_gpu(call: Callable[[], Any]) -> float:
    """The same on the GPU, which sleeps until the host has queued the call: launch overhead does not count.

    A call for which the GPU woke up too early is timed again after a longer sleep. One that waits for the device wakes
    it up each time, and its host time counts.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for attempt in range(_ATTEMPTS):
        _sweep("cuda")
        torch.cuda._sleep(_SLEEP_CYCLES * _LONGER**attempt)
        start.record()
        result = call()
        end.record()
        was_asleep = not start.query()
        end.synchronize()
        del result
        if was_asleep:
            break
    return start.elapsed_time(end) / 1e3


def _peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Peak memory of one call, without its inputs. On the CPU it is resident memory; None where there is no /proc."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed would not count again
        _take_lazily_freed()  # our backward keeps such memory for its next gradient
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _peak_bytes_alone(
    inputs: Callable[[], Inputs], contender: Callable[..., Any], device: str, threads: int
) -> int | None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tensors = inputs()
    contender(**tensors)
    return _peak_bytes(lambda: contender(**tensors), device)


def _peak_bytes_in_own_process(case: Case, contender: Callable[..., Any], device: str) -> int | None:
    # A fork of a process that has imported modules and nothing else, which saves their import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "entropy_rl_ext", "entropy_rl.train"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_peak_bytes_alone, case.inputs, contender, device, torch.get_num_threads()).result()


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) << 10


def _take_lazily_freed() -> None:
    """Makes the system reclaim the memory that it may reclaim at any time (MADV_FREE), which would count as ours."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if re.search(r"^LazyFree: +[1-9]", mapping, flags=re.MULTILINE):
            begin, end = (int(address, 16) for address in mapping.split()[0].split("-"))
            # Other pages of the mapping keep their content.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)


def _captured(contender: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    """The contender as a CUDA graph: a call copies the inputs in and returns the function that replays the graph."""
    static = {name: tensor.clone() for name, tensor in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    contender(**static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = contender(**static)

    def replay(**fresh: Tensor) -> Callable[[], Any]:
        for name, tensor in fresh.items():
            static[name].copy_(tensor)
        return lambda: (graph.replay(), result)

    return replay


def measure_copy(device: str, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes: the median of ten."""
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_timed(lambda: target.copy_(source), device) for _ in range(10))


def run_case(case: Case, device: str, repetitions: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """The record of the case for JSON; `tick` gets a line that says what runs."""
    contenders = {"ours": case.ours, **case.peers}
    calls: dict[str, Callable[..., Callable[[], Any]]] = {}
    records: dict[str, dict[str, Any]] = {}
    inputs = case.inputs()
    for name, contender in contenders.items():
        tick(f"{case.name}: {name} warms up")
        try:
            contender(**inputs)
            if case.graph and device == "cuda":
                calls[name] = _captured(contender, inputs)
            else:
                calls[name] = lambda contender=contender, **inputs: lambda: contender(**inputs)
            if case.peak_in_own_process:
                peak = _peak_bytes_in_own_process(case, contender, device)
            else:
                peak = _peak_bytes(calls[name](**inputs), device)
            records[name] = {"peak_bytes": peak, "seconds": []}
        except Exception as error:
            if name == "ours":
                raise
            calls.pop(name, None)
            records[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    order = list(calls)
    for repetition in range(repetitions):
        tick(f"{case.name}: {repetition + 1} of {repetitions}")
        inputs = case.inputs()
        order = order[1:] + order[:1]  # no contender always starts
        for name in order:
            records[name]["seconds"].append(_timed(calls[name](**inputs), device))
    return {
        "case": case.name,
        "backward": case.backward,
        "bytes": case.bytes,
        "goals": case.goals,
        "contenders": records,
    }


# --- where it ran ---------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit, for the head of a result file."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ours": entropy_rl_ext.__version__}
    for package in PEER_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "versions": versions,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),  # of the peers; ATEN_CPU_CAPABILITY selects it
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "csrc", "entropy_rl_ext", "setup.py", "benchmarks/*.py")),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None
