"""The configuration: every key is checked and explained, and an error is one line."""

import itertools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from entropy_rl import config as configuration
from entropy_rl import train
from entropy_rl.config import reference
from entropy_rl.selection import OPTIONS
from training import ACTOR, as_arguments, broken_copy

YAML = Path(configuration.__file__).parent / "train.yaml"


def keys_of(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict) or not node:
        return {prefix}
    return {key for name, child in node.items() for key in keys_of(child, f"{prefix}.{name}".lstrip("."))}


def test_every_key_has_a_rule() -> None:
    keys = keys_of(OmegaConf.to_container(OmegaConf.load(YAML)))
    assert keys == configuration.RULES.keys()


def test_every_key_has_a_comment() -> None:
    lines = YAML.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r" *\w+: \S", line):
            assert above.strip().startswith("#"), line


def test_only_the_model_and_the_data_must_be_given(overrides: dict[str, Any]) -> None:
    needed = ("actor_rollout_ref.model.path", "data.train_files")
    config = configuration.load(as_arguments({key: overrides[key] for key in needed}))
    assert config.actor_rollout_ref.actor.entropy_top_ratio is None


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    assert YAML.read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{ACTOR}.entropy_top_ration", 0.2, "nearest: actor_rollout_ref.actor.entropy_top_ratio"),
        (f"+{ACTOR}.entropy_top_k", 5, "there is no key 'actor_rollout_ref.actor.entropy_top_k'"),
        (f"{ACTOR}.entropy_top_ratio", 0, "a number above 0 and at most 1, or null"),
        (f"{ACTOR}.entropy_top_ratio", 1.5, "a number above 0 and at most 1, or null"),
        (f"{ACTOR}.entropy_top_ratio", "nan", "a number above 0 and at most 1, or null"),
        (f"{ACTOR}.entropy_top_ratio", "high", "a number above 0 and at most 1, or null"),
        (f"{ACTOR}.entropy_top_score", "logits", "one of entropy, surprisal, random, or FILE.py:function"),
        (f"{ACTOR}.entropy_top_score", "/nowhere/mine.py:f", "mine.py:f: there is no such file"),
        (f"{ACTOR}.entropy_top_rule", "top", "one of topk, threshold, quantile"),
        (f"{ACTOR}.entropy_top_scope", "batch", "one of micro_batch, mini_batch, sequence"),
        (f"{ACTOR}.entropy_top_ranks", "all", "one of local, global"),
        (f"{ACTOR}.entropy_top_normalize", "all", "one of selected, response"),
        (f"{ACTOR}.entropy_rest.weight", -0.1, "a number of at least 0"),
        (f"{ACTOR}.entropy_rest.clip_ratio_low", -0.1, "a number of at least 0, or null"),
        (f"{ACTOR}.entropy_rest.clip_ratio_high", "wide", "a number of at least 0, or null"),
        (f"{ACTOR}.entropy_rest.kl_loss_coef", -1, "a number of at least 0, or null"),
        (f"{ACTOR}.entropy_veto.probability", 1.5, "a number above 0 and at most 1, or null"),
        (f"{ACTOR}.entropy_veto.entropy", 0, "a number above 0, or null"),
        (f"{ACTOR}.entropy_veto.entropy", 0.1, "both numbers of entropy_veto must be set, or none"),
        (f"{ACTOR}.token_weight", "mine.py", "it must be FILE.py:function, or null"),
        (f"{ACTOR}.token_weight", "/nowhere/mine.py:f", "mine.py:f: there is no such file"),
        (f"{ACTOR}.policy_loss.loss_mode", "ppo", "one of vanilla, gpg, clip_cov"),
        (f"{ACTOR}.policy_loss.loss_mode", "dro", "policy_loss.dro_beta=null: loss_mode dro needs"),
        (f"{ACTOR}.loss_agg_mode", "mean", "one of token-mean, token-sum"),
        (f"{ACTOR}.kl_loss_type", "k4", "low_var_kl"),
        (f"{ACTOR}.clip_ratio_c", 1, "a number above 1"),
        (f"{ACTOR}.optim.lr", "-1e-6", "a number of at least 0"),
        (f"{ACTOR}.optim.betas", "[0.9]", "a list of 2"),
        (f"{ACTOR}.ppo_mini_batch_size", 3, "must divide data.train_batch_size=4"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu", 3, "must divide ppo_mini_batch_size * rollout.n = 8"),
        *(
            ("actor_rollout_ref.rollout.temperature", value, "a number of at least 1e-06 and at most 1e+06")
            for value in (0, 1e-39, 1e300, "nan")
        ),
        ("actor_rollout_ref.rollout.val_kwargs.temperature", 1e-39, "0, or a number of at least 1e-06"),
        ("actor_rollout_ref.rollout.top_p", 0, "a number above 0 and at most 1"),
        ("actor_rollout_ref.rollout.n", 0, "an integer of at least 1"),
        ("actor_rollout_ref.rollout.n", 2.5, "an integer of at least 1"),
        ("actor_rollout_ref.rollout.n", "true", "an integer of at least 1"),
        ("actor_rollout_ref.model.path", "null", "a text"),
        ("actor_rollout_ref.model.path", "/nowhere", "no tokenizer can be loaded from it"),
        ("algorithm.adv_estimator", "gae", "one of grpo, rloo, gpg, reinforce_plus_plus"),
        ("data.train_files", "null", "exactly one of the two must be set"),
        ("data.reasoning_gym.name", "chain_sum", "exactly one of the two must be set"),
        ("data.train_batch_size", 32, "at most the number of training problems, 16"),
        ("data.max_prompt_length", 3, "a prompt has 7 tokens"),
        ("trainer.logger", "[clearml]", "each one of console, file, tensorboard, wandb, mlflow"),
        ("trainer.log_samples_freq", 0, "-1, or an integer of at least 1"),
        ("trainer.resume_mode", "resume_path", "trainer.resume_from_path=null: it must be a path"),
        ("trainer.default_local_dir", "/proc/run", "trainer.default_local_dir=/proc/run: it cannot be created"),
        ("trainer.n_gpus_per_node", 8, "torchrun started 1 processes"),
        ("trainer.total_training_steps", 0, "an integer of at least 1, or null"),
    ],
)
def test_an_error_is_one_line(
    key: str, value: Any, expected: str, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr: the key, its value, and what is allowed; exit status 2."""
    assert train.main(as_arguments(overrides | {key: value})) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert key.lstrip("+").rsplit(".", 1)[-1] in message
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"entropy_top_scope": "sequence", "entropy_top_ranks": "global"},
            "entropy_top_ranks=global: it must be local with entropy_top_scope sequence",
        ),
        (
            {"entropy_top_ratio": "null", "entropy_rest.weight": 0.1},
            "entropy_rest.weight=0.1: it needs entropy_top_ratio",
        ),
        (
            {"policy_loss.loss_mode": "gspo", "entropy_rest.weight": 0.1},
            "entropy_rest.weight=0.1: loss_mode gspo has one ratio per sequence and no weights",
        ),
        (
            {"entropy_rest.clip_ratio_low": 0.1},
            "entropy_rest.clip_ratio_low=0.1: entropy_rest.weight is 0, so those tokens have no loss to clip",
        ),
        (
            {"entropy_rest.kl_loss_coef": 0.0},
            "entropy_rest.kl_loss_coef=0.0: it needs use_kl_loss, which is false",
        ),
    ],
)
def test_keys_that_contradict_each_other(
    changes: dict[str, Any], expected: str, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(as_arguments(overrides | {f"{ACTOR}.{key}": value for key, value in changes.items()})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {ACTOR}.{expected}") and message.count("\n") == 1


def test_all_unknown_keys_are_named_at_once(overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """As in a command line of verl with keys that this trainer does not have."""
    unknown = {"trainer.critic_warmup": 0, "actor_rollout_ref.rollout.gpu_memory_utilization": 0.4}
    assert train.main(as_arguments(overrides | unknown)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(f"there is no key '{key}'" in message for key in unknown)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(
    package: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("entropy_rl.config.find_spec", lambda name: None if name == package else find_spec(name))
    assert train.main(as_arguments(overrides | {"trainer.logger": f"[file,{package}]"})) == 2
    message = capsys.readouterr().err
    assert message == f"error: trainer.logger={package}: the package is not installed; pip install {package}\n"


@pytest.mark.parametrize("override", ["data", "data.seed", "data.seed=[", "=3", "data=3", "hydra.verbose=true"])
def test_an_override_that_cannot_be_read(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([override]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and override in message


def test_an_interpolation_that_leads_nowhere(overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*as_arguments(overrides), "data.seed='${data.sed}'"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gpu_that_does_not_exist(
    overrides: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train.main(as_arguments(overrides | {"trainer.device": "cuda"})) == 2
    assert "trainer.device=cuda: PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer*", None, "no tokenizer can be loaded from it: its files are missing"),
        ("tokenizer.json", b"{", "no tokenizer can be loaded from it"),
        ("config.json", b"{", "can be loaded from it"),
        ("model.safetensors", b"weights", "no Hugging Face causal language model can be loaded from it"),
    ],
)
def test_a_broken_model(
    file: str,
    content: bytes | None,
    expected: str,
    overrides: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = broken_copy(overrides["actor_rollout_ref.model.path"], tmp_path / "broken", file, content)
    assert train.main(as_arguments(overrides | {"actor_rollout_ref.model.path": path})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: actor_rollout_ref.model.path={path}: ") and message.count("\n") == 1
    assert expected in message


def test_a_chat_template_that_refuses(
    overrides: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken_copy(
        overrides["actor_rollout_ref.model.path"],
        tmp_path / "broken",
        "chat_template.jinja",
        b"{{ raise_exception('roles must alternate') }}",
    )
    assert train.main(as_arguments(overrides | {"actor_rollout_ref.model.path": path})) == 2
    message = capsys.readouterr().err
    assert "the tokenizer's chat template refuses a conversation: roles must alternate" in message
    assert message.count("\n") == 1


def test_the_keys_of_the_selection_are_explained_once() -> None:
    """In OPTIONS, which TRL's --help prints; train.yaml and thereby docs/configuration.md have the same texts."""
    texts = {key: text for key, _, text in reference.entries(YAML.read_text())}
    for name, text in OPTIONS.items():
        assert texts[f"{ACTOR}.{name}"] == text


def test_the_reference_is_current() -> None:
    """It has every key; `python -m entropy_rl.config.reference > docs/configuration.md` updates it."""
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    assert page == reference.reference()
    assert {key for key, _, _ in reference.entries(YAML.read_text())} == configuration.RULES.keys()
