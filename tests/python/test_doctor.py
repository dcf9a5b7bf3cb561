"""`entropy-rl doctor` in this environment, and in environments where something is wrong."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import entropy_rl_ext.reference
from entropy_rl import cli, doctor, extras


def findings(check: Callable[[], Any]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in check()}


def install(monkeypatch: pytest.MonkeyPatch, version: Callable[[str], str | None]) -> None:
    """Makes `version` of a distribution's name the installed version."""
    monkeypatch.setattr(extras, "installed_version", version)
    monkeypatch.setattr(doctor, "installed_version", version)


def test_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("no problems found\n") and "fix:" not in shown
    assert torch.__version__ in shown
    for name in ("token_entropy", "global_top_mask", "policy_loss"):
        assert re.search(rf"✓ {name} \(cpu\) +agrees with reference", shown)


def test_every_public_op_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is added later: its arguments follow from its signature."""
    tested = doctor.tested_ops()
    assert set(tested) == set(entropy_rl_ext.__all__) - {"build_info"}
    samples = doctor.sample_arguments(torch, "cpu")
    assert all(isinstance(doctor.arguments_for(name, samples), dict) for name in tested)
    monkeypatch.setattr("entropy_rl_ext.reference.new_op", lambda logits, other, mask=None: None, raising=False)
    assert doctor.arguments_for("new_op", samples) == "other"
    assert doctor.arguments_for("new_op", samples | {"other": 1}).keys() == {"logits", "other", "mask"}


def test_a_wrong_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = entropy_rl_ext.token_entropy
    monkeypatch.setattr(entropy_rl_ext, "token_entropy", lambda *a, **o: right(*a, **o) + 0.001)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"✗ token_entropy \(cpu\) +differs from reference: .*\n      fix: pip install", shown)
    assert shown.endswith("1 problem found\n")


def test_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return 2 * gradients[0]

    right = entropy_rl_ext.token_entropy
    monkeypatch.setattr(entropy_rl_ext, "token_entropy", lambda *a, **o: Doubled.apply(right(*a, **o)))
    assert findings(doctor.check_ops)["token_entropy (cpu)"].state == "wrong"


def test_a_check_that_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(entropy_rl_ext, "aggregate", broken)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "failed: RuntimeError: no kernel" in shown and "entropy_rl.train" in shown


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    found = findings(doctor.check_torch)["torch"]
    assert found.state == "wrong" and found.fix == "pip install -U torch"


def test_a_gpu_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("glob.glob", lambda _: ["/dev/nvidia0"])
    found = findings(doctor.check_torch)["CUDA"]
    assert found.state == "wrong" and "CUDA build" in found.fix


@pytest.mark.parametrize(
    ("cuda", "capability", "registered", "state", "text"),
    [
        ("", (9, 0), True, "wrong", "not built"),
        ("13.0", (9, 0), False, "wrong", "none is registered for"),
        ("13.0", (7, 5), True, "wrong", "GPU 0 is sm_75"),
        ("13.0", (9, 0), True, "ok", "built with CUDA 13.0"),
    ],
)
def test_cuda_kernels_on_a_machine_with_a_gpu(
    cuda: str,
    capability: tuple[int, int],
    registered: bool,
    state: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(doctor, "_has_kernel", lambda *_: registered)
    info = {"cuda": cuda, "cuda_archs": "8.0;9.0+PTX"}
    found = [f for f in doctor._cuda_kernels(torch, info) if f.state == state]
    assert found and text in found[0].text and bool(found[0].fix) == (state == "wrong")


def test_cuda_kernels_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has both versions, and the ops are not tested on a GPU that cannot run them."""
    failure = "its CUDA kernels were built for CUDA 13.0, and torch 2.11.0 is built for CUDA 12.8"
    info = entropy_rl_ext.build_info() | {"cuda": "13.0", "cuda_archs": "8.0;9.0+PTX"}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(entropy_rl_ext, "build_info", lambda: info)
    monkeypatch.setattr(entropy_rl_ext._library, "cuda_failure", failure)
    [found] = doctor._cuda_kernels(torch, info)
    assert found.state == "wrong" and found.text.endswith(failure) and "--no-build-isolation" in found.fix
    assert {finding.state for finding in doctor.check_ops() if "(cpu)" in finding.name} == {"ok"}
    assert not [finding for finding in doctor.check_ops() if "(cuda)" in finding.name]


@pytest.mark.parametrize(("simd", "state"), [("avx2", "ok"), ("", "wrong")])
def test_instruction_set(simd: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = entropy_rl_ext.build_info() | {"simd": simd}
    monkeypatch.setattr(entropy_rl_ext, "build_info", lambda: info)
    [found] = [finding for finding in doctor.check_library() if finding.name == "CPU kernels"]
    assert found.state == state and bool(found.fix) == (state == "wrong")


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are optional: nothing is wrong without them."""
    own = extras.installed_version(extras.DISTRIBUTION)
    install(monkeypatch, lambda name: own if name == extras.DISTRIBUTION else None)
    states = [finding.state for check in (doctor.check_training, doctor.check_integrations) for finding in check()]
    assert states == ["off", "off", "off"]


def test_packages_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = extras.installed_version
    install(monkeypatch, lambda name: "4.57.1" if name == "transformers" else real(name))
    (found,) = doctor.check_training()
    assert found.state == "off" and re.search(r"lacks transformers\S+ \(4.57.1 is installed\): pip install", found.text)


def test_an_integration_that_is_not_really_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"verl": "0.9.1", "trl": "1.16.0"}.get)
    monkeypatch.setattr(doctor, "_module_is_missing", lambda _: False)
    monkeypatch.setattr(doctor, "VERL", "raise RuntimeError('its loss could not be installed')")
    monkeypatch.setattr(doctor, "TRL", "pass")
    found = findings(doctor.check_integrations)
    assert (found["verl"].state, found["TRL"].state) == ("wrong", "ok")
    assert found["verl"].text == "0.9.1; RuntimeError: its loss could not be installed"
    assert found["verl"].fix == doctor.REINSTALL


def test_an_integration_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that works is untested, and one that does not is replaced by a version that the tests run."""
    install(monkeypatch, {"verl": "0.10.0", "trl": "1.17.0"}.get)
    monkeypatch.setattr(extras, "requirements", lambda extra: {"verl": ["verl==0.9.*"], "trl": ["trl==1.16.*"]}[extra])
    monkeypatch.setattr(doctor, "VERL", "raise RuntimeError('verl 0.10.0 has no ppo_loss')")
    monkeypatch.setattr(doctor, "TRL", "pass")
    found = findings(doctor.check_integrations)
    untested = "entropy-rl-ext is tested with trl==1.16.* (1.17.0 is installed)"
    assert found["TRL"] == ("ok", "TRL", f"1.17.0; EntropyGRPOTrainer can be imported; {untested}", "")
    failure = "0.10.0; RuntimeError: verl 0.10.0 has no ppo_loss"
    assert found["verl"] == ("wrong", "verl", failure, "pip install 'verl==0.9.*'")


def in_its_own_process(**environment: str) -> tuple[int, str]:
    result = subprocess.run(
        [Path(sys.executable).with_name("entropy-rl"), "doctor"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert not result.stderr
    return result.returncode, result.stdout


def test_an_instruction_set_that_is_not_there() -> None:
    """One problem, although no op works."""
    status, shown = in_its_own_process(ENTROPY_RL_SIMD="sse9")
    assert status == 1 and shown.endswith("1 problem found\n")
    assert re.search(r"✗ CPU kernels +ENTROPY_RL_SIMD=sse9 names no.*\n      fix: unset ENTROPY_RL_SIMD", shown)
    status, shown = in_its_own_process(ENTROPY_RL_SIMD="portable")
    assert status == 0 and re.search(r"✓ CPU kernels +SIMD: portable", shown)


def test_a_package_that_was_not_built(tmp_path: Path) -> None:
    unbuilt = tmp_path / "entropy_rl_ext"
    shutil.copytree(Path(entropy_rl_ext.__file__).parent, unbuilt, ignore=shutil.ignore_patterns("*.so"))
    status, shown = in_its_own_process(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert status == 1 and shown.endswith("1 problem found\n")
    assert re.search(r"✗ entropy_rl_ext +cannot be imported: .*is not built.*\n      fix: pip install", shown)


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    status, shown = in_its_own_process(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert status == 1 and shown.endswith("1 problem found\n")
    assert re.search(r"✗ torch +cannot be imported: libcudart.so.13: .*\n      fix: pip install 'torch>=2.11'", shown)


def test_a_package_found_on_the_search_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the metadata of an installation."""

    def nothing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "version", nothing)
    monkeypatch.setattr(extras, "requires", nothing)
    assert findings(doctor.check_library)["installed as"].state == "off"
    states = [finding.state for check in (doctor.check_training, doctor.check_integrations) for finding in check()]
    assert states == ["off", "off", "off"]
