"""The entropy_top_* keys compose, and user errors stop the driver before anything starts."""

import importlib
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import verl.utils.config
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from entropy_rl import extras
from entropy_rl.config import ConfigError
from entropy_rl.integrations.verl import hooks, plugin

RECIPES = sorted((Path(__file__).parents[3] / "recipe").rglob("*.sh"))
RATIO = "actor_rollout_ref.actor.entropy_top_ratio"
MICRO_BATCH = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


@pytest.mark.parametrize("engine", ["dp", "megatron"])
def test_the_bare_key_composes(engine: str) -> None:
    assert composed(f"model_engine={engine}").actor_rollout_ref.actor.entropy_top_ratio is None
    actor = composed(f"model_engine={engine}", f"{RATIO}=0.2").actor_rollout_ref.actor
    assert actor.entropy_top_ratio == 0.2


@pytest.fixture(scope="module")
def verls_own() -> dict[str, str]:
    """The configuration that verl composes for each engine without this package's plugin."""
    code = (
        "import json\n"
        "from hydra import compose, initialize_config_module\n"
        "from omegaconf import OmegaConf\n"
        "with initialize_config_module('verl.trainer.config', version_base=None):\n"
        "    composed = {e: compose('ppo_trainer', overrides=['model_engine=' + e]) for e in ('dp', 'megatron')}\n"
        "print(json.dumps({engine: OmegaConf.to_yaml(config) for engine, config in composed.items()}))\n"
    )
    # The plugin does nothing unless verl is imported.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("engine", ["dp", "megatron"])
def test_everything_else_is_verls(engine: str, verls_own: dict[str, str]) -> None:
    ours, theirs = OmegaConf.to_yaml(composed(f"model_engine={engine}")), verls_own[engine]
    rest = (
        r"entropy_rest:\n      weight: 0.0\n      clip_ratio_low: null\n      clip_ratio_high: null\n      kl_loss_coef"
    )
    tables = rf"{rest}|entropy_veto:\n      probability: null\n      entropy"
    extra = re.compile(rf"^    (entropy_top_\w+|{tables}|token_weight|_target_): .*\n", re.MULTILINE)
    assert "entropy_top_ratio" in ours and "entropy_top_ratio" not in theirs
    assert extra.sub("", ours[ours.index("actor_rollout_ref:") :]) == extra.sub(
        "", theirs[theirs.index("actor_rollout_ref:") :]
    )


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("entropy_top_ratio", "1.5", "above 0 and at most 1, or null"),
        ("entropy_top_ratio", "0", "above 0 and at most 1, or null"),
        ("entropy_top_ratio", "-1", "above 0 and at most 1, or null"),
        ("entropy_top_ratio", "nan", "above 0 and at most 1, or null"),
        ("entropy_top_ratio", "True", "above 0 and at most 1, or null"),
        ("entropy_top_ratio", "20%", "above 0 and at most 1, or null"),
        ("entropy_top_score", "logits", "one of entropy, surprisal, random, or FILE.py:function"),
        ("entropy_top_rule", "top", "one of topk, threshold, quantile"),
        ("entropy_top_scope", "batch", "one of micro_batch, mini_batch, sequence"),
        ("entropy_top_source", "rollout", "one of prepass, old_policy"),
        ("entropy_top_ranks", "all", "one of local, global"),
        ("entropy_top_normalize", "tokens", "one of selected, response"),
        ("entropy_rest.weight", "-1", "a number of at least 0"),
        ("entropy_rest.clip_ratio_low", "-1", "a number of at least 0, or null"),
        ("entropy_rest.kl_loss_coef", "-1", "a number of at least 0, or null"),
        ("entropy_veto.probability", "2", "above 0 and at most 1, or null"),
        ("token_weight", "mine", "FILE.py:function, or null"),
        ("entropy_top_kernel", "triton", "one of entropy_rl, verl"),
        ("policy_loss.loss_mode", "mine", "one of vanilla, gpg"),
    ],
)
def test_a_wrong_value_names_what_is_allowed(key: str, value: str, allowed: str) -> None:
    overrides = [f"{RATIO}=0.2", MICRO_BATCH, f"actor_rollout_ref.actor.{key}={value}"]
    with pytest.raises(Exception, match=re.escape(f"actor_rollout_ref.actor.{key}={value}") + f".*{allowed}"):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


def test_keys_that_contradict_each_other_are_refused() -> None:
    keys = ("entropy_top_scope=sequence", "entropy_top_ranks=global")
    overrides = [f"{RATIO}=0.2", MICRO_BATCH, *(f"actor_rollout_ref.actor.{key}" for key in keys)]
    with pytest.raises(Exception, match="entropy_top_ranks=global: it must be local with entropy_top_scope sequence"):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


def test_weights_need_a_ratio() -> None:
    overrides = [MICRO_BATCH, "actor_rollout_ref.actor.entropy_rest.weight=0.1"]
    with pytest.raises(Exception, match=re.escape("entropy_rest.weight=0.1: it needs entropy_top_ratio")):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("entropy_rest.clip_ratio_low=0.1", "entropy_rest.weight is 0, so those tokens have no loss to clip"),
        ("entropy_rest.kl_loss_coef=0.1", "it needs use_kl_loss, which is false"),
    ],
)
def test_ranges_of_the_other_tokens_that_make_no_sense(override: str, reason: str) -> None:
    overrides = [f"{RATIO}=0.2", MICRO_BATCH, f"actor_rollout_ref.actor.{override}"]
    with pytest.raises(Exception, match=re.escape(f"actor_rollout_ref.actor.{override}: {reason}")):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


def test_a_key_that_does_not_exist_does_not_compose() -> None:
    with pytest.raises(ConfigCompositionException, match="entropy_top_ration"):
        composed("actor_rollout_ref.actor.entropy_top_ration=0.2")


def test_megatron_selects_a_mini_batch_by_the_old_policy_alone() -> None:
    scope = "actor_rollout_ref.actor.entropy_top_scope=mini_batch"
    source = "actor_rollout_ref.actor.entropy_top_source"
    overrides = ("model_engine=megatron", f"{RATIO}=0.2", MICRO_BATCH, scope)
    with pytest.raises(Exception, match=f"{source}=prepass: it must be one of old_policy"):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)
    omega_conf_to_dataclass(composed(*overrides, f"{source}=old_policy").actor_rollout_ref.actor)


def main_ppo(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", MICRO_BATCH, *overrides],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_driver_fails_before_anything_starts() -> None:
    run = main_ppo(f"{RATIO}=1.5")
    assert run.returncode == 1
    assert f"{RATIO}=1.5: it must be a number above 0 and at most 1, or null" in run.stderr
    assert "ray init" not in run.stdout


def test_a_plugin_that_was_not_loaded_stops_the_run() -> None:
    run = main_ppo(f"{RATIO}=0.2", VERL_USE_EXTERNAL_PLUGINS="none")
    assert run.returncode == 1
    assert "could not be installed" in run.stderr and "VERL_USE_EXTERNAL_PLUGINS=none" in run.stderr
    assert "ray init" not in run.stdout


def test_a_plugin_that_failed_stops_the_run_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "failure", "ImportError: no such thing")
    with pytest.raises(Exception, match="could not be installed: ImportError: no such thing"):
        omega_conf_to_dataclass(composed(f"{RATIO}=0.2", MICRO_BATCH).actor_rollout_ref.actor)
    omega_conf_to_dataclass(composed(MICRO_BATCH).actor_rollout_ref.actor)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl says that it is 0.10."""
    real = extras.installed_version
    monkeypatch.setattr(extras, "installed_version", lambda name: "0.10.0" if name == "verl" else real(name))
    monkeypatch.setattr(extras, "requirements", lambda extra: ["verl==0.9.*"])


def test_a_newer_verl_with_every_hook_works(newer: None) -> None:
    with pytest.warns(UserWarning, match=r"tested with verl==0.9.\* \(0.10.0 is installed\)"):
        actor = omega_conf_to_dataclass(composed(f"{RATIO}=0.2", MICRO_BATCH).actor_rollout_ref.actor)
    assert actor.entropy_top_ratio == 0.2


@pytest.mark.parametrize("hook", [*hooks.LOSS, *hooks.engines()])
def test_a_verl_without_a_hook_is_refused(
    hook: str, newer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one of the loss the keys do not exist. Without one of the engines a configuration with a ratio fails."""
    module, _, path = hook.partition(":")
    owner, _, name = path.rpartition(".")
    imported = importlib.import_module(module)
    monkeypatch.setattr(operator.attrgetter(owner)(imported) if owner else imported, name, None)
    message = f"verl 0.10.0 has no {module}.{path}, which entropy-rl-ext needs: pip install 'verl==0.9.*'"
    if hook in hooks.LOSS:
        with pytest.raises(ConfigCompositionException, match="entropy_top_ratio"):
            composed(f"{RATIO}=0.2", MICRO_BATCH)
        assert f"{message}: actor_rollout_ref.actor.entropy_top_* are not available\n" in capsys.readouterr().err
    else:
        with pytest.raises(Exception, match=re.escape(message)):
            omega_conf_to_dataclass(composed(f"{RATIO}=0.2", MICRO_BATCH).actor_rollout_ref.actor)


def test_sequence_level_losses_accept_the_ratio_and_say_that_they_do_not_apply_it() -> None:
    overrides = (f"{RATIO}=0.2", MICRO_BATCH, "actor_rollout_ref.actor.policy_loss.loss_mode=gspo")
    with pytest.warns(UserWarning, match="entropy_top_ratio=0.2 is not applied: loss_mode gspo"):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_compose(recipe: Path, tmp_path: Path) -> None:
    """The complete command of each recipe, as bash passes it to Python."""
    (tmp_path / "python").write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"MODEL_PATH": "model", "TRAIN_FILES": "train.parquet", "VAL_FILES": "val.parquet"}
    run = subprocess.run(
        [recipe],
        env=os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    config = composed(*run.stdout.splitlines())
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.entropy_top_ratio == 0.2
    omega_conf_to_dataclass(config.algorithm)
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)


def test_recipes_are_found() -> None:
    assert {recipe.name for recipe in RECIPES} >= {"run_entropy_top20.sh", "run_dapo_14b_entropy_top20.sh"}


OLD_POLICY = ("entropy_top_scope=mini_batch", "entropy_top_source=old_policy")
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
SOURCE = "actor_rollout_ref.actor.entropy_top_source=old_policy: it must be prepass with"


def checked(*overrides: str, ratio: str = "0.2") -> None:
    """Checks a run's configuration as the driver does before Ray starts."""
    actor = tuple(f"actor_rollout_ref.actor.{key}" if key.startswith("entropy_top") else key for key in overrides)
    rollout = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1"
    config = composed(f"{RATIO}={ratio}", MICRO_BATCH, rollout, *actor)
    verl.utils.config.validate_config(config, use_reference_policy=False, use_critic=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # verl would let each rank attend to its own slice alone.
        *(
            (
                (f"+{ATTENTION}={attention}", "actor_rollout_ref.model.use_remove_padding=true", f"{size}=2"),
                f"{ATTENTION}={attention}: it must be flash attention",
            )
            for attention, size in (
                ("eager", "actor_rollout_ref.actor.ulysses_sequence_parallel_size"),
                ("sdpa", "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"),
                ("flex_attention", "actor_rollout_ref.actor.ulysses_sequence_parallel_size"),
            )
        ),
        # There are no entropies of an old policy.
        (
            (*OLD_POLICY, "algorithm.rollout_correction.bypass_mode=true"),
            f"{SOURCE} algorithm.rollout_correction.bypass_mode=true",
        ),
        ((*OLD_POLICY, "trainer.use_v1=false"), f"{SOURCE} trainer.use_v1=false"),
    ],
)
def test_a_run_that_contradicts_the_selection_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        checked(*overrides)
    assert "\n" not in str(error.value)
    checked(*(key for key in overrides if not key.startswith("entropy_top")), ratio="null")  # verl alone takes it


def test_runs_that_do_not_contradict_the_selection() -> None:
    checked()
    checked(*OLD_POLICY)
    checked("entropy_top_scope=mini_batch", "algorithm.rollout_correction.bypass_mode=true")
    ulysses = (
        "actor_rollout_ref.model.use_remove_padding=true",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
    )
    checked(*ulysses)
    checked(*ulysses, f"+{ATTENTION}=packed_cpu")
    checked(f"+{ATTENTION}=eager")


def test_the_driver_refuses_such_a_run_before_anything_starts() -> None:
    attention = (f"+{ATTENTION}=eager", "actor_rollout_ref.model.use_remove_padding=true")
    size = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    rollout = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1"
    run = main_ppo(f"{RATIO}=0.2", "algorithm.adv_estimator=grpo", *attention, size, rollout)
    assert run.returncode == 1
    assert f"{ATTENTION}=eager: it must be flash attention" in run.stderr
    assert "ray init" not in run.stdout


def test_megatrons_dynamic_context_parallelism_is_refused() -> None:
    key = "actor_rollout_ref.actor.megatron.dynamic_context_parallel"
    length = "actor_rollout_ref.actor.megatron.max_seqlen_per_dp_cp_rank=64"
    overrides = ("model_engine=megatron", f"{RATIO}=0.2", MICRO_BATCH, f"{key}=true", length)
    with pytest.raises(Exception, match=re.escape(f"{key}=true: it must be false with entropy_top_ratio")):
        omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


@pytest.mark.parametrize("engine", ["veomni", "torchtitan"])
def test_other_engines_have_no_such_key(engine: str) -> None:
    with pytest.raises(ConfigCompositionException, match="entropy_top_ratio"):
        composed(f"model_engine={engine}", f"{RATIO}=0.2")
