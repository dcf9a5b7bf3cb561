"""PyTorch on the emulated devices. Import this before anything uses CUDA, in a process that run.sh starts.

PyTorch's own CUDA kernels cannot run, so that every aten op that has one is carried out by its CPU kernel over the same
memory. What makes a program wait for a GPU still counts as a wait here.
"""

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

emulator = ctypes.CDLL(None)
if not hasattr(emulator, "cudaemu_reports"):
    raise ImportError("libcudaemu.so is not loaded; start Python by tests/emulator/run.sh")
emulator.cudaemu_reports.restype = ctypes.c_char_p
emulator.cudaemu_launches.restype = ctypes.c_char_p
emulator.cudaemu_profile.restype = ctypes.c_char_p
emulator.cudaemu_executed.restype = ctypes.c_ulonglong
emulator.cudaemu_set.argtypes = [ctypes.c_ulonglong, ctypes.c_double, ctypes.c_int]
emulator.cudaemu_set_most_instructions.argtypes = [ctypes.c_ulonglong]
emulator.cudaemu_load_ptx.argtypes = [ctypes.c_char_p]
emulator.cudaemu_mark_written.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
emulator.cudaemu_is_capturing.argtypes = [ctypes.c_void_p]
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_longlong)
emulator.cudaemu_enqueue.argtypes = [ctypes.c_void_p, _Callback, ctypes.c_longlong]


def reports() -> list[str]:
    """What the emulator found since the last call."""
    return emulator.cudaemu_reports().decode().splitlines()


def launches() -> dict[str, int]:
    """How often each kernel ran since the process began."""
    lines = emulator.cudaemu_launches().decode().splitlines()
    return {name: int(count) for name, count in (line.split("\t") for line in lines)}


def profile() -> list[list[str]]:
    """[kernel, PTX line, opcode, file:line, times] of each instruction that ran since the last call."""
    return [line.split("\t") for line in emulator.cudaemu_profile().decode().splitlines()]


def configure(seed: int = 0, approximation_error: float = 0.0, check_races: bool = True) -> None:
    """seed: 0, or a random order of threads; approximation_error: relative, of ex2.approx and rcp.approx."""
    emulator.cudaemu_set(seed, approximation_error, check_races)


def host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    buffer = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    memory = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


target = "cuda"  # where to_device puts tensors


def to_device(tensor: Tensor) -> Tensor:
    """A copy on the target device with the strides of the tensor, and what lies between them."""
    storage = tensor.untyped_storage()
    moved = torch.empty(storage.nbytes(), dtype=torch.uint8, device=target)
    host(moved).copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    mark_written(moved)
    empty = torch.empty(0, dtype=tensor.dtype, device=target)
    return empty.set_(moved.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def mark_written(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        emulator.cudaemu_mark_written(storage.data_ptr(), storage.nbytes())


def _is_cuda(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or a result."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


# ---- Waiting for a device

# Ops that need a size or a value from the device.
_WAITS = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim", "aten::_unique2", "aten::is_nonzero",
}  # fmt: skip


def _is_capturing() -> bool:
    return any(emulator.cudaemu_is_capturing(torch.cuda.current_stream(i).cuda_stream) for i in range(2))


def _wait(why: str) -> None:
    if torch.cuda.get_sync_debug_mode() == 2 or _is_capturing():
        raise RuntimeError(f"called a synchronizing CUDA operation: {why}")


def _check_wait(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if name in _WAITS:
        _wait(name)
    if name.startswith("aten::index") and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(arguments[1])):
        _wait("indexing by a mask")
    if name == "aten::copy_" and "cpu" in (arguments[0].device.type, arguments[1].device.type):
        cpu = arguments[0] if arguments[0].device.type == "cpu" else arguments[1]
        non_blocking = arguments[2] if len(arguments) > 2 else keywords.get("non_blocking", False)
        if not (non_blocking and cpu.is_pinned()):
            _wait("a copy between host and device")


# ---- Ops by their CPU kernels

_generators: dict[int, torch.Generator] = {}
_replays: list[Callable[[], None]] = []


@_Callback
def _replay(index: int) -> None:
    _replays[index]()


def _host_generator(generator: torch.Generator) -> torch.Generator:
    if generator.device.type != "cuda":
        return generator
    return _generators.setdefault(id(generator), torch.Generator().manual_seed(generator.initial_seed()))


@dataclass
class _Call:
    """One call of an aten op on CUDA tensors, carried out by the CPU kernel over their memory."""

    name: str
    op: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    device: torch.device = field(init=False)
    originals: dict[int, Tensor] = field(default_factory=dict)  # by the id of what stands for them on the host
    keep: list[Tensor] = field(default_factory=list)  # so that no id is used again

    def __post_init__(self) -> None:
        given = [t for v in (*self.arguments, *self.keywords.values()) for t in _tensors(v) if _is_cuda(t)]
        chosen = given[0].device if given else torch.device(self.keywords.get("device") or "cuda")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        self.device = torch.device("cuda", index)
        schema = self.op._schema
        self.written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        # The tensor of an `out` may have to grow, which memory that it does not own cannot: results are copied into it.
        self.outs = {
            name: self.keywords[name] for i, name in self.written if isinstance(self.keywords.get(name), Tensor)
        }

    def to_host(self, value: Any) -> Any:
        if _is_cuda(value):
            alias = host(value)
            self.originals[id(alias)] = value
            self.keep.append(alias)
            return alias
        if isinstance(value, torch.Generator):
            return _host_generator(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, list | tuple):
            return type(value)(self.to_host(v) for v in value)
        return value

    def host_call(self) -> Any:
        arguments = [self.to_host(a) for a in self.arguments]
        keywords = {k: self.to_host(v) for k, v in self.keywords.items() if k not in self.outs}
        outs = {k: torch.empty(0, dtype=t.dtype) for k, t in self.outs.items()}
        if ".dtype" in self.name:  # products of 16-bit factors in float32, which only CUDA has
            result = _wide_product(self.name, *arguments, **keywords, **outs)
        else:
            result = self.overload(arguments)(*arguments, **keywords, **outs)
        for k, tensor in self.outs.items():
            if tensor.shape != outs[k].shape:
                tensor.resize_(outs[k].shape)
            host(tensor).copy_(outs[k])
            self.originals[id(outs[k])] = tensor
            self.keep.append(outs[k])
        return result

    def overload(self, arguments: list[Any]) -> Any:
        """The op; where a number stands for a tensor, whichever overload takes it."""
        schema = self.op._schema
        for argument, value in zip(schema.arguments, arguments, strict=False):
            if isinstance(argument.type, torch.TensorType) and isinstance(value, int | float):
                return getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
        return self.op

    def to_device(self, value: Any, fresh: list[Tensor]) -> Any:
        """A result as the caller gets it; `fresh` collects the memory of new tensors."""
        if isinstance(value, Tensor):
            if id(value) in self.originals:
                return self.originals[id(value)]
            moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
            fresh.append(host(moved))
            fresh[-1].copy_(value)
            mark_written(moved)
            return moved
        if isinstance(value, list | tuple):
            return type(value)(self.to_device(v, fresh) for v in value)
        return value

    def run(self) -> Any:
        fresh: list[Tensor] = []
        result = self.to_device(self.host_call(), fresh)
        for i, name in self.written:
            value = self.arguments[i] if i < len(self.arguments) else self.keywords.get(name)
            for tensor in filter(_is_cuda, _tensors(value)):
                mark_written(tensor)
        if _is_capturing():
            self.capture(fresh)
        return result

    def capture(self, fresh: list[Tensor]) -> None:
        def again() -> None:
            new = [value for value in _tensors(self.host_call()) if id(value) not in self.originals]
            for memory, value in zip(fresh, new, strict=True):
                memory.copy_(value)

        _replays.append(again)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        emulator.cudaemu_enqueue(stream, _replay, len(_replays) - 1)


def _wide_product(name: str, *arguments: Any, **keywords: Any) -> Tensor:
    out = keywords.pop("out", None)
    if "addmm" in name:
        base, a, b, dtype = arguments[:4]
        result = torch.addmm(base.to(dtype), a.to(dtype), b.to(dtype), **keywords)
    else:
        a, b, dtype = arguments[:3]
        result = torch.mm(a.to(dtype), b.to(dtype))
    return result if out is None else out.resize_(result.shape).copy_(result)


# ---- Installation

# Ops that launch nothing: PyTorch's own run.
_NATIVE = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::record_stream",
    "aten::is_pinned", "aten::_pin_memory", "aten::_local_scalar_dense", "aten::resize_as_", "aten::is_set_to",
    "aten::_efficientzerotensor", "aten::_has_same_storage_numel",
}  # fmt: skip

_library = torch.library.Library("aten", "IMPL")


def _is_replaced(name: str) -> bool:
    if not name.startswith("aten::") or name in _NATIVE or name.startswith("aten::set_"):
        return False
    return not any(word in name for word in ("cudnn", "miopen", "cuda"))


def _install() -> None:
    for name in sorted({*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"}):
        if not _is_replaced(name):
            continue
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        # A view only describes the tensor that it returns.
        if op is None or any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns):
            continue

        def run(*arguments: Any, name: str = name, op: Any = op, **keywords: Any) -> Any:
            _check_wait(name, arguments, keywords)
            return _Call(name, op, arguments, keywords).run()

        _library.impl(name.removeprefix("aten::"), run, "CUDA")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # each replaces a kernel of PyTorch
    _install()

if __name__ == "__main__":  # device.py SCRIPT ARGUMENTS...
    import runpy
    import sys

    sys.modules["device"] = sys.modules["__main__"]
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        for line in reports():
            print("cudaemu:", line)
