"""Hooks of other trainers: a version with all of them works, a version without one is refused with its name."""

import sys
import types
import warnings

import pytest

from entropy_rl import extras, integrations

HOOKS = {
    "trainer_for_tests:Trainer.loss": "self, model, inputs",
    "trainer_for_tests:score": "hidden, weight, ...",
    "trainer_for_tests:Config": "..., beta, loss_type",
}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A trainer of version 2.1, which is newer than the tests' 2.0."""

    class Trainer:
        def loss(self, model: object, inputs: object) -> None: ...

    class Config:
        def __init__(self, loss_type: str = "", gamma: float = 0, beta: float = 0) -> None: ...

    def score(hidden: object, weight: object, bias: object = None) -> None: ...

    module = types.ModuleType("trainer_for_tests")
    vars(module).update(Trainer=Trainer, Config=Config, score=score)
    monkeypatch.setitem(sys.modules, "trainer_for_tests", module)
    monkeypatch.setattr(extras, "requirements", lambda extra: ["trl==2.0.*"])
    monkeypatch.setattr(extras, "installed_version", lambda name: "2.1.0")
    return module


def test_newer_version_with_all_hooks(trainer: types.ModuleType) -> None:
    assert integrations.missing_hook("trl", HOOKS) is None
    with pytest.warns(UserWarning) as caught:
        integrations.warn_if_untested("trl")
    [warning] = caught
    assert str(warning.message) == "entropy-rl-ext is tested with trl==2.0.* (2.1.0 is installed)"


def test_tested_version_gives_no_warning(trainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda name: "2.0.7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integrations.warn_if_untested("trl")


FIX = "pip install 'trl==2.0.*'"


@pytest.mark.parametrize("name", ["Trainer.loss", "score", "Config"])
def test_missing_hook_is_named(name: str, trainer: types.ModuleType) -> None:
    owner, _, attribute = name.rpartition(".")
    delattr(getattr(trainer, owner) if owner else trainer, attribute)
    expected = f"trl 2.1.0 has no trainer_for_tests.{name}, which entropy-rl-ext needs: {FIX}"
    assert integrations.missing_hook("trl", HOOKS) == expected


def test_missing_module_is_named(trainer: types.ModuleType) -> None:
    assert integrations.missing_hook("trl", {"no_such_trainer:score": "hidden"}) == (
        "no_such_trainer.score, which entropy-rl-ext needs, cannot be imported from trl 2.1.0 "
        f"(No module named 'no_such_trainer'): {FIX}"
    )


def test_other_parameters_are_named(trainer: types.ModuleType) -> None:
    class Trainer:
        def loss(self, model: object, inputs: object, weights: object = None) -> None: ...

    vars(trainer)["Trainer"] = Trainer
    assert integrations.missing_hook("trl", HOOKS) == (
        "trainer_for_tests.Trainer.loss of trl 2.1.0 takes (self, model, inputs, weights), but entropy-rl-ext needs "
        f"(self, model, inputs): {FIX}"
    )


@pytest.mark.parametrize(
    ("actual", "wanted", "fits"),
    [
        (["a", "b"], "a, b", True),
        (["b", "a"], "a, b", False),
        (["a", "b", "c"], "a, b", False),
        (["a", "b", "c"], "a, b, ...", True),
        (["a", "c", "b"], "a, b, ...", False),
        (["a"], "a, b, ...", False),
        (["c", "b", "a"], "..., a, b", True),
        (["c", "b"], "..., a, b", False),
    ],
)
def test_parameters(actual: list[str], wanted: str, fits: bool) -> None:
    assert integrations._fits(actual, wanted.split(", ")) == fits
