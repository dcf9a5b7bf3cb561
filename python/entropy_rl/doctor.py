"""The command `entropy-rl doctor`: what is installed, what is active, and a fix for everything that is wrong."""

import argparse
import glob
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from entropy_rl.extras import DISTRIBUTION, install, installed_version, lacking, package_of, requirements
from entropy_rl.integrations import install_tested, untested

REINSTALL = "pip install --no-build-isolation -e . in a clone of the package"


class Finding(NamedTuple):
    """One line of the report. The state is "off" if something optional is absent; `fix` says how to repair it."""

    state: Literal["ok", "off", "wrong"]
    name: str
    text: str
    fix: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings. Returns 1 if anything is wrong, otherwise 0."""
    wrong = 0
    for title, checks in CHECKS.items():
        print(title)
        for finding in (finding for check in checks for finding in _guarded(check)):
            print(f"  {MARKS[finding.state]} {finding.name:34} {finding.text}")
            if finding.fix:
                print(f"      fix: {finding.fix}")
            wrong += finding.state == "wrong"
    print(f"{wrong} problem{'' if wrong == 1 else 's'} found" if wrong else "no problems found")
    return 1 if wrong else 0


MARKS = {"ok": "✓", "off": "·", "wrong": "✗"}


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that raises is a finding too, and the checks after it still run."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("wrong", "this check", f"failed: {type(error).__name__}: {error}", REINSTALL)


# ---- PyTorch


def check_torch() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    try:
        import torch
    except Exception as error:  # a broken installation raises what its loader raises
        yield Finding("wrong", "torch", f"cannot be imported: {error}", "pip install 'torch>=2.11'")
        return
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 11):
        yield Finding("wrong", "torch", f"{torch.__version__}; 2.11 is the oldest", "pip install -U torch")
    else:
        yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")

    if torch.version.cuda is None:
        if glob.glob("/dev/nvidia[0-9]*"):
            yield Finding(
                "wrong",
                "CUDA",
                "this machine has an NVIDIA GPU, but this torch is a build without CUDA",
                "install torch's CUDA build (https://pytorch.org/get-started), then this package again",
            )
        else:
            yield Finding("off", "CUDA", "torch is a build without CUDA; everything runs on the CPU")
    elif not torch.cuda.is_available():
        yield Finding("off", "CUDA", f"torch is built for CUDA {torch.version.cuda} and sees no GPU (try nvidia-smi)")
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("ok", f"GPU {index}", f"{name}, sm_{major}{minor}, CUDA {torch.version.cuda}")


# ---- The op library


def check_library() -> Iterator[Finding]:
    if not _torch_is_there():
        yield Finding("off", "entropy_rl_ext", "not checked, because it needs torch")
        return
    try:
        import torch

        import entropy_rl_ext
    except Exception as error:
        yield Finding("wrong", "entropy_rl_ext", f"cannot be imported: {error}", REINSTALL)
        return
    info = entropy_rl_ext.build_info()
    yield Finding("ok", "entropy_rl_ext", f"{info['version']}, in {Path(entropy_rl_ext.__file__).parent}")
    yield Finding("ok", "built with", f"torch {info['torch']}, C++ compiler {info['compiler']}")
    if installed_version(DISTRIBUTION) is None:
        yield Finding("off", "installed as", "not installed: it was found on the search path (PYTHONPATH)")
    elif installed_version(DISTRIBUTION) != info["version"]:
        yield Finding(
            "wrong",
            "installed as",
            f"{DISTRIBUTION} {installed_version(DISTRIBUTION)}; the libraries have version {info['version']}",
            REINSTALL,
        )
    if info["simd"]:
        yield Finding("ok", "CPU kernels", f"SIMD: {info['simd']}")
    else:
        yield Finding(
            "wrong",
            "CPU kernels",
            f"ENTROPY_RL_SIMD={os.environ.get('ENTROPY_RL_SIMD')} names no instruction set of this processor",
            "unset ENTROPY_RL_SIMD, or set it to portable, avx2 or avx512",
        )
    yield from _cuda_kernels(torch, info)


def _torch_is_there() -> bool:
    try:
        import torch  # noqa: F401
    except Exception:  # check_torch reports it
        return False
    return True


def _cuda_kernels(torch: Any, info: dict[str, str]) -> Iterator[Finding]:
    from entropy_rl_ext import _library

    available = torch.version.cuda is not None and torch.cuda.is_available()
    rebuild = "in a checkout, with a CUDA toolkit (CUDA_HOME): pip install --no-build-isolation -e ."
    if not info["cuda"]:
        text = "not built"
        yield Finding("wrong", "CUDA kernels", text, rebuild) if available else Finding("off", "CUDA kernels", text)
        return
    built = f"built with CUDA {info['cuda']} for {info['cuda_archs']}"
    if torch.version.cuda is None:
        yield Finding("off", "CUDA kernels", f"{built}; not loaded, because torch is a build without CUDA")
        return
    if (failure := _library.cuda_failure) is not None:
        yield Finding("wrong", "CUDA kernels", f"not loaded, so the ops work on the CPU only: {failure}", rebuild)
        return
    missing = [name for name in _ops() if not _has_kernel(torch, name, "CUDA")]
    if missing:
        yield Finding("wrong", "CUDA kernels", f"{built}; none is registered for {', '.join(missing)}", REINSTALL)
        return
    oldest = min(float(arch.split("+")[0]) for arch in info["cuda_archs"].split(";"))
    for index in range(torch.cuda.device_count() if available else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if major + minor / 10 < oldest:
            fix = f"TORCH_CUDA_ARCH_LIST='{major}.{minor}' {rebuild.removeprefix('in a checkout, ')}"
            yield Finding("wrong", "CUDA kernels", f"{built}; GPU {index} is sm_{major}{minor}", fix)
    yield Finding(
        "ok" if available else "off", "CUDA kernels", built + ("" if available else "; no GPU to run them on")
    )


def _ops() -> list[str]:
    """The names of all registered ops."""
    import torch

    schemas = torch._C._jit_get_all_schemas()
    return sorted({schema.name.split("::")[1] for schema in schemas if schema.name.startswith("entropy_rl::")})


def _has_kernel(torch: Any, op: str, key: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"entropy_rl::{op}", key) or has(f"entropy_rl::{op}", "CompositeImplicitAutograd")


# ---- Self-test


def check_ops() -> Iterator[Finding]:
    """Compares the values and gradients of each op with `reference`, on the CPU and on a GPU if there is one."""
    try:
        import torch

        import entropy_rl_ext.reference
        from entropy_rl_ext import _library

        works = bool(entropy_rl_ext.build_info()["simd"])
    except Exception:  # check_library reports it
        works = False
    if not works:
        yield Finding("off", "every op", "not tested, because the op library does not work (see above)")
        return
    devices = ["cpu"]
    loaded = torch.version.cuda is not None and entropy_rl_ext.build_info()["cuda"] and not _library.cuda_failure
    if loaded and torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        samples = sample_arguments(torch, device)
        for name in tested_ops():
            label = f"{name} ({device})"
            arguments = arguments_for(name, samples)
            if isinstance(arguments, str):
                yield Finding("off", label, f"not tested: no sample for its argument {arguments}")
            elif (error := self_test(torch, name, arguments)) is None:
                yield Finding("ok", label, "agrees with reference")
            else:
                yield Finding("wrong", label, f"differs from reference: {error}", REINSTALL)


def tested_ops() -> list[str]:
    """The public ops that have a reference."""
    import entropy_rl_ext
    from entropy_rl_ext import reference

    return [name for name in entropy_rl_ext.__all__ if hasattr(reference, name)]


def sample_arguments(torch: Any, device: str) -> dict[str, Any]:
    """A value for each parameter name that the ops use. Gradients are compared for those that require one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = False) -> Any:
        return torch.randn(shape, generator=generator).to(device).requires_grad_(grad)

    mask = (torch.rand(4, 33, generator=generator) < 0.8).to(device)
    return {
        "logits": normal(4, 33, 1003, grad=True),
        "targets": torch.randint(1003, (4, 33), generator=generator).to(device),
        "hidden": normal(4, 33, 16, grad=True),
        "weight": normal(1003, 16, grad=True),
        "values": normal(4, 33, grad=True),
        "log_prob": normal(4, 33, grad=True),
        "old_log_prob": normal(4, 33),
        "ref_log_prob": normal(4, 33),
        "advantages": normal(4, 33),
        "entropy": normal(4, 33).abs(),
        "mask": mask,
        "response_mask": mask,
        "temperature": 0.7,
        "loss_mode": "clip_cov",
    }


def arguments_for(op: str, samples: dict[str, Any]) -> dict[str, Any] | str:
    """Keyword arguments for an op by its reference's signature, or the name of a required one without a sample."""
    from entropy_rl_ext import reference

    arguments = {}
    for name, parameter in inspect.signature(getattr(reference, op)).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if name in samples and (required or name in ("mask", "temperature")):
            arguments[name] = samples[name]
        elif required:
            return name
    return arguments


def self_test(torch: Any, name: str, arguments: dict[str, Any]) -> str | None:
    """None if the op agrees with its reference, otherwise how the two differ."""
    import entropy_rl_ext
    from entropy_rl_ext import reference

    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    results = []
    for module in (entropy_rl_ext, reference):
        first, *others = _tensors(torch, getattr(module, name)(**arguments))
        gradients: tuple[Any, ...] = ()
        if first.requires_grad:
            weight = torch.linspace(0.5, 1.5, first.numel(), device=first.device).reshape(first.shape)
            gradients = torch.autograd.grad((first * weight).sum(), leaves)
        results.append([first, *others, *gradients])
    if len(results[0]) != len(results[1]):
        return f"{len(results[0])} results, and {len(results[1])} from the reference"
    for actual, expected in zip(*results, strict=True):
        try:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, check_dtype=False)
        except AssertionError as error:
            return " ".join(str(error).split())
    return None


def _tensors(torch: Any, result: Any) -> list[Any]:
    """The tensors of a result: a tensor, a tuple, or one with a dictionary of metrics."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values for tensor in _tensors(torch, value)]


# ---- The training layer


def check_training() -> Iterator[Finding]:
    """Checks the packages of the extra `train`, which the trainer and `inspect` need."""
    if installed_version(DISTRIBUTION) is None:
        yield Finding("off", "entropy_rl.train", "not checked, because this package is not installed")
        return
    wanted = requirements("train")
    missing = [text for requirement in wanted if (text := lacking(requirement))]
    if all(installed_version(package_of(requirement)) is None for requirement in wanted):
        yield Finding("off", "entropy_rl.train", f"not installed: {install('train')}")
    elif missing:
        fix = f"{install('train')}, or train with verl or TRL, which do not need it"
        yield Finding("off", "entropy_rl.train", f"lacks {', '.join(missing)}: {fix}")
    else:
        yield Finding("ok", "entropy_rl.train", f"transformers {installed_version('transformers')}")


# These programs run in separate processes, because the imports are slow, change global state and can fail in any way.
VERL = """
import sys
import verl
if "entropy_rl.integrations.verl.plugin" not in sys.modules:
    raise RuntimeError("verl did not load the plug-in entropy_rl of this package")
from entropy_rl.integrations.verl import plugin
plugin.require()
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=["actor_rollout_ref.actor.entropy_top_ratio=0.2"])
assert config.actor_rollout_ref.actor.entropy_top_ratio == 0.2
from verl.workers.utils import losses
assert losses.ppo_loss.__module__.startswith("entropy_rl."), "verl still uses its own ppo_loss"
"""
TRL = """
from entropy_rl.integrations.trl import EntropyGRPOConfig, EntropyGRPOTrainer
from trl import GRPOTrainer
assert issubclass(EntropyGRPOTrainer, GRPOTrainer)
"""


def check_integrations() -> Iterator[Finding]:
    plugins = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    for name, package, program, active in (
        ("verl", "verl", VERL, "actor_rollout_ref.actor.entropy_top_ratio is available, and its loss is installed"),
        ("TRL", "trl", TRL, "EntropyGRPOTrainer can be imported"),
    ):
        installed = installed_version(package)
        if installed is None:
            yield Finding("off", name, "not installed")
        elif _module_is_missing(f"entropy_rl.integrations.{package}"):
            yield Finding("wrong", name, f"{installed}; this installation lacks its integration", REINSTALL)
        elif (failure := _run(program)) is None:
            yield Finding("ok", name, "; ".join(filter(None, (installed, active, untested(package)))))
        elif package == "verl" and plugins != "auto" and "entropy_rl" not in plugins.split(","):
            fix = "unset VERL_USE_EXTERNAL_PLUGINS, or name entropy_rl in it"
            yield Finding("wrong", name, f"{installed}; {failure}: VERL_USE_EXTERNAL_PLUGINS={plugins}", fix)
        else:
            fix = REINSTALL if untested(package) is None else install_tested(package)
            yield Finding("wrong", name, f"{installed}; {failure}", fix)


def _module_is_missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


def _run(program: str) -> str | None:
    """None if a Python program succeeds, otherwise the last line of its stderr."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "the check took more than five minutes"
    lines = result.stderr.strip().splitlines()
    return None if result.returncode == 0 else lines[-1] if lines else f"exit status {result.returncode}"


CHECKS: dict[str, tuple[Callable[[], Iterator[Finding]], ...]] = {
    "PyTorch": (check_torch,),
    "Op library": (check_library,),
    "Ops against entropy_rl_ext.reference": (check_ops,),
    "Training": (check_training, check_integrations),
}
