"""The values that the configuration accepts, and its errors and warnings."""

import importlib.util
import math
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

import entropy_rl.integrations.trl as integration
from entropy_rl import extras
from entropy_rl.integrations.trl import EntropyGRPOConfig, EntropyGRPOTrainer
from grpo import PROMPTS, SETTINGS, share_of_digits

# Dual-token constraints.
DUAL = {"entropy_top_ratio": 0.2, "entropy_rest_weight": 1.0, "entropy_rest_clip_ratio_low": 0.1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_top_ratio": 0.0}, "entropy_top_ratio is 0.0; it must be above 0 and at most 1, or None"),
        ({"entropy_top_ratio": 1.5}, "entropy_top_ratio is 1.5"),
        ({"entropy_top_ratio": float("nan")}, "entropy_top_ratio is nan"),
        (
            {"entropy_top_score": "logits"},
            "entropy_top_score is 'logits'; it must be one of entropy, surprisal, random, FILE.py:function",
        ),
        ({"entropy_top_ratio": 0.2, "entropy_top_score": "/nowhere/a.py:f"}, "/nowhere/a.py:f: there is no such file"),
        ({"entropy_top_rule": "best"}, "entropy_top_rule is 'best'; it must be one of topk, threshold, quantile"),
        (
            {"entropy_top_scope": "batch"},
            "entropy_top_scope is 'batch'; it must be one of micro_batch, mini_batch, sequence",
        ),
        ({"entropy_top_ranks": "all"}, "entropy_top_ranks is 'all'; it must be one of local, global"),
        ({"entropy_top_normalize": "all"}, "entropy_top_normalize is 'all'; it must be one of selected, response"),
        (
            {"entropy_top_ratio": 0.2, "entropy_top_scope": "sequence", "entropy_top_ranks": "global"},
            "entropy_top_ranks is 'global'; it must be local with entropy_top_scope sequence",
        ),
        ({"entropy_rest_weight": -0.1}, "entropy_rest_weight is -0.1; it must be a number of at least 0"),
        (
            {"entropy_rest_clip_ratio_low": -0.1},
            "entropy_rest_clip_ratio_low is -0.1; it must be a number of at least 0",
        ),
        (
            {"entropy_rest_kl_loss_coef": math.nan},
            "entropy_rest_kl_loss_coef is nan; it must be a number of at least 0",
        ),
        ({"entropy_rest_clip_ratio_low": 0.1}, "entropy_rest_clip_ratio_low is 0.1; it needs entropy_top_ratio"),
        (
            {"entropy_top_ratio": 0.2, "entropy_rest_clip_ratio_high": 0.1},
            "entropy_rest_clip_ratio_high is 0.1; entropy_rest_weight is 0, so those tokens have no loss to clip",
        ),
        (
            {"entropy_top_ratio": 0.2, "entropy_rest_kl_loss_coef": 0.0},
            "entropy_rest_kl_loss_coef is 0.0; beta is 0.0, so there is no KL penalty",
        ),
        (
            DUAL | {"importance_sampling_level": "sequence"},
            "entropy_rest_clip_ratio_low is 0.1; importance_sampling_level 'sequence' has one ratio per sequence",
        ),
        (DUAL | {"loss_type": "sapo"}, "entropy_rest_clip_ratio_low is 0.1; loss_type 'sapo' does not clip"),
        (
            DUAL | {"loss_type": "cispo"},
            "entropy_rest_clip_ratio_low is 0.1; loss_type 'cispo' has no lower clip ratio",
        ),
        (
            {"entropy_veto_probability": 2.0},
            "entropy_veto_probability is 2.0; it must be above 0 and at most 1, or None",
        ),
        ({"entropy_veto_entropy": 0.0}, "entropy_veto_entropy is 0.0; it must be a number above 0, or None"),
        ({"token_weight": "mine"}, "token_weight is 'mine'; it must be FILE.py:function, or None"),
        ({"entropy_rest_weight": 0.1}, "entropy_rest_weight is 0.1; it needs entropy_top_ratio"),
        (
            {"entropy_top_ratio": 0.2, "entropy_veto_entropy": 0.1},
            "entropy_veto_probability is None; both numbers of entropy_veto must be set, or none",
        ),
        (
            {"entropy_top_ratio": 0.2, "entropy_rest_weight": 0.1, "entropy_coef": 0.1},
            "entropy_coef is 0.1 and tokens have weights",
        ),
        ({"entropy_lm_head": "liger"}, "entropy_lm_head is 'liger'; it must be one of "),
        (
            {"entropy_top_ratio": 0.2, "top_entropy_quantile": 0.3},
            "entropy_top_ratio is 0.2 and top_entropy_quantile is 0.3; set one of them",
        ),
        (
            {
                "entropy_top_ratio": 0.2,
                "entropy_top_scope": "mini_batch",
                "gradient_accumulation_steps": 4,
                "steps_per_generation": 2,
            },
            "steps_per_generation is 2; it must be a multiple of gradient_accumulation_steps, 4",
        ),
        (
            {"entropy_top_ratio": 0.2, "loss_type": "grpo", "entropy_coef": 0.1},
            "with an entropy bonus and loss_type 'grpo'; it must be 'response' there",
        ),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        EntropyGRPOConfig(output_dir=str(tmp_path), **SETTINGS | settings)
    assert message in str(error.value)


def test_the_trainer_needs_its_configuration(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is GRPOConfig; an EntropyGRPOConfig was expected"):
        EntropyGRPOTrainer(str(model_path), args=GRPOConfig(output_dir=str(tmp_path), **SETTINGS))


def import_again() -> Any:
    spec = importlib.util.spec_from_file_location("another", integration.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["another"] = module  # where dataclasses look up types
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["another"]
    return module


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL says that it is 1.17."""
    real = extras.installed_version
    monkeypatch.setattr(extras, "installed_version", lambda name: "1.17.0" if name == "trl" else real(name))
    monkeypatch.setattr(extras, "requirements", lambda extra: ["trl==1.16.*"])


def test_a_newer_trl_with_every_hook_works(newer: None, model_path: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tested with trl==1.16.\* \(1.17.0 is installed\)"):
        module = import_again()
    settings = SETTINGS | {"entropy_top_ratio": 0.2, "max_steps": 1}
    args = module.EntropyGRPOConfig(output_dir=str(tmp_path), **settings)
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = module.EntropyGRPOTrainer(str(model_path), share_of_digits, args, train_dataset=data)
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("hook", integration.HOOKS)
def test_a_trl_without_a_hook_is_refused(hook: str, newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, path = hook.partition(":")
    owner, _, name = path.rpartition(".")
    monkeypatch.setattr(operator.attrgetter(owner)(sys.modules[module]) if owner else sys.modules[module], name, None)
    message = f"trl 1.17.0 has no {module}.{path}, which entropy-rl-ext needs: pip install 'trl==1.16.*'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        import_again()


def test_a_trainer_without_an_attribute_is_refused(
    trainer: Callable[..., GRPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "ATTRIBUTES", (*integration.ATTRIBUTES, "_gone"))
    with pytest.raises(ImportError, match=r"GRPOTrainer of trl .* lacks _gone: pip install"):
        trainer(entropy_top_ratio=0.2)


def test_the_command_line_has_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = TrlParser(EntropyGRPOConfig)
    arguments = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    (config,) = parser.parse_args_and_config(
        [*arguments, "--entropy_top_ratio", "0.2", "--entropy_top_rule", "quantile", "--entropy_top_ranks", "global"]
    )
    assert (config.entropy_top_ratio, config.entropy_top_rule, config.entropy_top_ranks) == (0.2, "quantile", "global")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*arguments, "--entropy_top_rule", "best"])
    assert "invalid choice: 'best'" in capsys.readouterr().err


def test_sequence_level_ratios_give_a_warning(
    trainer: Callable[..., GRPOTrainer], recwarn: pytest.WarningsRecorder
) -> None:
    trainer(entropy_top_ratio=0.2, importance_sampling_level="sequence", loss_type="grpo")
    assert any("importance_sampling_level is 'sequence'" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    trainer(importance_sampling_level="sequence", loss_type="grpo")
    assert not any("importance_sampling_level is 'sequence'" in str(warning.message) for warning in recwarn)
