"""Complete runs of the documented command on a machine without a GPU. `-m full` runs the whole matrix."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import files as files_of
from pathlib import Path
from typing import Any

import pytest
import task
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from architectures import CONFIGS as ARCHITECTURES
from entropy_rl.integrations.verl import cpu
from tiny_model import WORDS

RECIPES = Path(__file__).parents[3] / "recipe/entropy_token_rule"
ACTOR = "actor_rollout_ref.actor."
FULL = pytest.mark.full
# Keys that a recipe sets for a cluster, with values for two cores.
SMALL = [
    "+entropy_rl=cpu",
    "data.train_batch_size=8",
    "data.max_prompt_length=16",
    "data.max_response_length=24",
    "actor_rollout_ref.rollout.n=4",
    f"{ACTOR}optim.lr=1e-3",
    f"{ACTOR}ppo_mini_batch_size=8",
    f"{ACTOR}ppo_micro_batch_size_per_gpu=8",
    f"{ACTOR}checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "trainer.resume_mode=disable",
    "trainer.logger=[file]",
]
# Keys in which a recipe for GPUs contradicts conf/entropy_rl/cpu.yaml. A command line overrides that file.
NO_GPU = [
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    f"{ACTOR}fsdp_config.ulysses_sequence_parallel_size=1",
    f"{ACTOR}fsdp_config.param_offload=false",
    f"{ACTOR}fsdp_config.optimizer_offload=false",
    "actor_rollout_ref.rollout.name=hf_cpu",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "trainer.n_gpus_per_node=1",
    "trainer.nnodes=1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = task.save_problems(tmp_path_factory.mktemp("files"))
    task.save_model(directory / "model")
    task.save_model(directory / "experts", config=ARCHITECTURES["qwen3_moe"])
    return directory


def train(command: list[str], files: Path, output: Path, *overrides: str, **environment: str) -> list[dict[str, Any]]:
    """Runs it and returns the metrics of each step."""
    status, log = start(command, files, output, *overrides, **environment)
    assert status == 0, log[-4000:]
    assert "generates on the CPU" in log
    return [json.loads(line)["data"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def start(command: list[str], files: Path, output: Path, *overrides: str, **environment: str) -> tuple[int, str]:
    """Returns the exit status and the output. Ray's actors end with the driver, which starts its own Ray."""
    log = output / "log"
    with log.open("w") as stream:
        run = subprocess.run(
            [
                *command,
                *SMALL,
                f"reward.custom_reward_function.path={files}/reward.py",
                f"trainer.default_local_dir={output}/checkpoints",
                *overrides,
            ],
            cwd=output,
            env=os.environ
            | {
                "VERL_USE_EXTERNAL_MODULES": "entropy_rl.integrations.verl.cpu",
                "VERL_FILE_LOGGER_PATH": str(output / "metrics.jsonl"),
                "OMP_NUM_THREADS": "1",
                "MODEL_PATH": str(files / "model"),
                "TRAIN_FILES": str(files / "train.parquet"),
                "VAL_FILES": str(files / "train.parquet"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
    return run.returncode, log.read_text()


def command_line(files: Path, python: str = sys.executable) -> list[str]:
    return [
        *(python, "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo"),
        *(f"data.train_files={files}/train.parquet", f"data.val_files={files}/train.parquet"),
        f"actor_rollout_ref.model.path={files}/model",
    ]


def main_ppo(
    files: Path, output: Path, *overrides: str, python: str = sys.executable, **environment: str
) -> list[dict[str, Any]]:
    return train(command_line(files, python), files, output, *overrides, **environment)


def assert_checkpoint_loads(files: Path, output: Path, ranks: int = 1) -> None:
    """The shards of the last step differ from the initial weights and equal those of the exported model."""
    actor = output / "checkpoints/global_step_2/actor"
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    shards = [
        torch.load(actor / f"model_world_size_{ranks}_rank_{rank}.pt", weights_only=False) for rank in range(ranks)
    ]
    saved = {name: torch.cat([shard[name].to_local() for shard in shards]) for name in shards[0]}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    exported = AutoModelForCausalLM.from_pretrained(actor / "huggingface", dtype=torch.float32).state_dict()
    assert exported.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(exported[name], value), name


def assert_trained(steps: list[dict[str, Any]], applied: bool = True) -> None:
    assert len(steps) == 2
    for metrics in steps:
        assert -1 <= metrics["critic/rewards/mean"] <= 1  # DAPO's penalty for length is up to 1
        assert 0 < metrics["actor/grad_norm"] < float("inf")
        if applied:
            assert metrics["actor/entropy_token_ratio"] == pytest.approx(0.2, abs=0.01)
            assert 0 < metrics["actor/entropy_threshold"] < 5
        else:
            assert "actor/entropy_token_ratio" not in metrics


@pytest.mark.parametrize(
    "loss_mode",
    ["vanilla", *(pytest.param(mode, marks=FULL) for mode in ("gpg", "clip_cov", "kl_cov", "gspo", "geo_mean"))],
)
def test_loss_modes(files: Path, tmp_path: Path, loss_mode: str) -> None:
    steps = main_ppo(files, tmp_path, f"{ACTOR}entropy_top_ratio=0.2", f"{ACTOR}policy_loss.loss_mode={loss_mode}")
    assert_trained(steps, applied=loss_mode not in ("gspo", "geo_mean"))
    assert_checkpoint_loads(files, tmp_path)


def environment_without_this_package(directory: Path) -> Path:
    """Creates an environment with everything that is installed except this package; returns its interpreter."""
    venv.create(directory)
    site = next(directory.glob("lib/python*/site-packages"))
    ours = {Path(file).parts[0] for file in files_of("entropy-rl-ext") if not str(file).startswith("..")}
    assert {"entropy_rl", "entropy_rl_ext", "hydra_plugins"} < ours
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if installed.name not in ours and installed.name != "__pycache__":
            (site / installed.name).symlink_to(installed)
    return directory / "bin/python"


def test_null_is_verl_without_this_package(files: Path, tmp_path: Path) -> None:
    """Every metric of every step has the same bits, except those that measure time and memory.

    The run without this package uses one of its files, copied as a separate module: the platform and the rollout for
    a CPU, without which verl does not start here.
    """
    # One response per step: verl reorders several responses between runs, so that the last bits of sums differ even
    # without this package.
    fixed = (
        "actor_rollout_ref.rollout.full_determinism=true",
        "data.train_batch_size=1",
        "actor_rollout_ref.rollout.n=1",
        f"{ACTOR}ppo_mini_batch_size=1",
        f"{ACTOR}ppo_micro_batch_size_per_gpu=1",
        f"{ACTOR}ppo_epochs=2",
        f"{ACTOR}entropy_coeff=0.001",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "trainer.save_freq=-1",
    )
    (tmp_path / "with").mkdir()
    ours = main_ppo(files, tmp_path / "with", *fixed, f"{ACTOR}entropy_top_ratio=null")

    without = tmp_path / "without"
    without.mkdir()
    python = environment_without_this_package(tmp_path / "environment")
    shutil.copy(cpu.__file__, without / "cpu_platform.py")
    shutil.copytree(Path(cpu.__file__).parent / "conf/entropy_rl", without / "conf/entropy_rl")
    environment = {"PYTHONPATH": str(without), "VERL_USE_EXTERNAL_MODULES": "cpu_platform"}
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    for module, found in (("verl", True), ("entropy_rl", False), ("entropy_rl_ext", False), ("hydra_plugins", False)):
        run = subprocess.run([python, "-c", probe, module], cwd=without, env=os.environ | environment)
        assert (run.returncode == 0) == found, module
    verls = main_ppo(
        files, without, *fixed, f"hydra.searchpath=[file://{without}/conf]", python=str(python), **environment
    )

    measured = re.compile("^timing|perf/")
    assert len(ours) == len(verls) == 2
    for step, (own, theirs) in enumerate(zip(ours, verls, strict=True)):
        own, theirs = (
            {name: value for name, value in metrics.items() if not measured.search(name)} for metrics in (own, theirs)
        )
        assert len(own) > 30 and own["actor/grad_norm"] > 0
        assert {
            name: (own.get(name), theirs.get(name)) for name in own | theirs if own.get(name) != theirs.get(name)
        } == {}, step


def test_the_lm_head_runs_on_the_selected_rows_only(files: Path, tmp_path: Path) -> None:
    """The selection of an optimizer step uses the entropies that the trainer passes on with the old log-probs."""
    steps = main_ppo(
        files,
        tmp_path,
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}entropy_top_scope=mini_batch",
        f"{ACTOR}entropy_top_source=old_policy",
        "actor_rollout_ref.model.use_fused_kernels=true",
    )
    assert_trained(steps)
    for metrics in steps:
        # The policy has not moved yet.
        assert metrics["actor/ppo_kl_selected"] == pytest.approx(0, abs=1e-5)
        assert "actor/ppo_kl" not in metrics and "actor/entropy_loss" not in metrics


def test_a_share_of_each_response_with_weights(files: Path, tmp_path: Path) -> None:
    """The tables and the function of the weights reach the workers, and the extremes are those of all responses."""
    (tmp_path / "mine.py").write_text(
        "def half(log_prob, entropy, advantages, response_mask):\n    return 0.5 + 0 * entropy\n"
    )
    steps = main_ppo(
        files,
        tmp_path,
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}entropy_top_scope=sequence",
        f"{ACTOR}entropy_top_score=random",
        f"{ACTOR}entropy_rest.weight=0.1",
        f"{ACTOR}entropy_veto.probability=0.001",
        f"{ACTOR}entropy_veto.entropy=9.0",
        f"{ACTOR}token_weight={tmp_path}/mine.py:half",
        f"{ACTOR}ppo_mini_batch_size=4",
        f"{ACTOR}ppo_micro_batch_size_per_gpu=4",
    )
    for metrics in steps:
        lowest, highest = (metrics[f"actor/entropy_token_ratio/{end}"] for end in ("min", "max"))
        assert 0.2 <= lowest <= metrics["actor/entropy_token_ratio"] <= highest <= 1
        assert 0 <= metrics["actor/entropy_veto_ratio"] < 0.5 and 0 < metrics["actor/score_threshold"] < 1
        assert 0 < metrics["actor/grad_norm"] < float("inf")


@pytest.mark.parametrize("loss_mode", ["vanilla", *(pytest.param(mode, marks=FULL) for mode in ("clip_cov", "kl_cov"))])
def test_two_workers_mini_batches_epochs_and_weights(files: Path, tmp_path: Path, loss_mode: str) -> None:
    steps = main_ppo(
        files,
        tmp_path,
        f"{ACTOR}policy_loss.loss_mode={loss_mode}",
        "trainer.n_gpus_per_node=2",
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}ppo_mini_batch_size=4",
        f"{ACTOR}ppo_micro_batch_size_per_gpu=4",
        f"{ACTOR}ppo_epochs=2",
        f"{ACTOR}use_kl_loss=true",
        f"{ACTOR}entropy_top_scope=mini_batch",
        f"{ACTOR}entropy_top_ranks=global",
        "algorithm.rollout_correction.rollout_is=token",
    )
    for metrics in steps:
        assert metrics["actor/entropy_token_ratio"] == pytest.approx(0.2, abs=0.02)
        assert "actor/kl_loss" in metrics and "rollout_corr/rollout_is_mean" in metrics
    assert_checkpoint_loads(files, tmp_path, ranks=2)


PACKED = [
    "actor_rollout_ref.model.use_remove_padding=true",
    "actor_rollout_ref.model.override_config.attn_implementation=packed_cpu",
]
# What larger runs use, each with the fused head on the selected rows.
LARGER = {
    "packing, dynamic batch size": [
        *PACKED,
        *(f"{ACTOR}use_dynamic_bsz=true", f"{ACTOR}ppo_max_token_len_per_gpu=120"),
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=120",
    ],
    "Ulysses": [*PACKED, "trainer.n_gpus_per_node=2", f"{ACTOR}fsdp_config.ulysses_sequence_parallel_size=2"],
    "LoRA": ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true"],
    "experts": ["actor_rollout_ref.model.path={files}/experts"],
}


@FULL
@pytest.mark.parametrize("name", LARGER)
def test_larger_runs(files: Path, tmp_path: Path, name: str) -> None:
    steps = main_ppo(
        files,
        tmp_path,
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}entropy_top_scope=mini_batch",
        f"{ACTOR}entropy_top_ranks=global",
        f"{ACTOR}entropy_top_source=old_policy",
        "actor_rollout_ref.model.use_fused_kernels=true",
        *(override.format(files=files) for override in LARGER[name]),
    )
    assert_trained(steps)
    for metrics in steps:
        assert metrics["actor/ppo_kl_selected"] == pytest.approx(0, abs=1e-5)  # the policy has not moved yet
    if name == "LoRA":
        assert_adapter_loads(tmp_path)


def assert_adapter_loads(output: Path) -> None:
    """verl's merger makes a model and an adapter of the checkpoint, in bfloat16, and PEFT loads them."""
    actor, merged = output / "checkpoints/global_step_2/actor", output / "merged"
    command = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    subprocess.run(
        [sys.executable, *command, "--local_dir", str(actor), "--target_dir", str(merged)], check=True, timeout=300
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, merged / "lora_adapter").state_dict()
    saved = torch.load(actor / "model_world_size_1_rank_0.pt", weights_only=False)
    assert any("lora_B" in name and value.to_local().any() for name, value in saved.items())  # 0 before training
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name].bfloat16(), value.to_local().bfloat16()), name


TOOL = '''
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool


@function_tool
def clock() -> str:
    """Tells the time."""
    return "It is noon."


@ToolParser.register("every_answer")
class EveryAnswer(ToolParser):
    """A random model calls no tool, so each of its answers is taken for a call."""

    async def extract_tool_calls(self, responses_ids, tools=None):
        return self.tokenizer.decode(responses_ids), [FunctionCall(name="clock", arguments="{}")]
'''
WEIGHT = '''
import time
from pathlib import Path

import torch


def one(log_prob, entropy, advantages, response_mask):
    """Weighs all tokens alike, and keeps what it was given."""
    torch.save((entropy, response_mask), Path(__file__).parent / f"{time.time_ns()}.pt")
    return torch.ones_like(entropy)
'''


@FULL
def test_tokens_of_a_tool_in_an_agent_loop(files: Path, tmp_path: Path) -> None:
    """verl's ToolAgentLoop: a turn of the model, one of the tool, one of the model. The tool's tokens neither compete
    nor count."""
    shutil.copytree(files / "model", tmp_path / "model")
    # Digits end a turn, so that several fit into a response.
    ends = [1, *(WORDS.index(digit) for digit in "0123456789")]
    GenerationConfig(eos_token_id=ends, pad_token_id=0).save_pretrained(tmp_path / "model")
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "weight.py").write_text(WEIGHT)
    rollout = "actor_rollout_ref.rollout."
    steps = main_ppo(
        files,
        tmp_path,
        f"actor_rollout_ref.model.path={tmp_path}/model",
        "data.max_response_length=64",
        "data.return_raw_chat=true",
        f"{rollout}multi_turn.enable=true",
        f"{rollout}multi_turn.max_assistant_turns=2",
        f"{rollout}multi_turn.format=every_answer",
        f"{rollout}multi_turn.function_tool_path={tmp_path}/tool.py",
        f"{rollout}agent.default_agent_loop=tool_agent",
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}entropy_top_scope=mini_batch",
        f"{ACTOR}token_weight={tmp_path}/weight.py:one",
    )
    seen = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(seen) == len(steps) == 2
    for (entropy, mask), metrics in zip(seen, steps, strict=True):
        inside = mask.bool()
        # Tokens of the tool have tokens of the model before and after them.
        between = ~inside & (inside.cumsum(1) > 0) & (inside.flip(1).cumsum(1).flip(1) > 0)
        with_tool = between.any(1)
        assert with_tool.sum() >= len(mask) // 4
        assert (between.sum(1)[with_tool] == len("It is noon.")).all()
        n = int(inside.sum())
        k = int(n * 0.2 + 0.9999)
        assert metrics["actor/entropy_token_ratio"] == pytest.approx(k / n, rel=1e-6)
        assert metrics["actor/entropy_threshold"] == pytest.approx(
            entropy[inside].sort(descending=True).values[k - 1].item(), rel=1e-6
        )


@FULL
def test_a_run_resumes_from_its_checkpoint(files: Path, tmp_path: Path) -> None:
    ratio = f"{ACTOR}entropy_top_ratio=0.2"
    main_ppo(files, tmp_path, ratio)
    (third,) = main_ppo(files, tmp_path, ratio, "trainer.resume_mode=auto", "trainer.total_training_steps=3")
    assert third["training/global_step"] == 3
    assert third["actor/entropy_token_ratio"] == pytest.approx(0.2, abs=0.01)


@FULL
def test_a_worker_without_the_plugin_stops_the_run(files: Path, tmp_path: Path) -> None:
    """The driver has the plugin, and Ray's processes do not."""
    policy = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_PLUGINS=none"
    status, log = start(command_line(files), files, tmp_path, f"{ACTOR}entropy_top_ratio=0.2", policy)
    assert status != 0
    assert "entropy_top_ratio is set, but its loss could not be installed" in log
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in log
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


@FULL
def test_the_rollouts_log_probs_replace_the_old_ones(files: Path, tmp_path: Path) -> None:
    steps = main_ppo(
        files,
        tmp_path,
        f"{ACTOR}entropy_top_ratio=0.2",
        f"{ACTOR}entropy_top_scope=mini_batch",
        "algorithm.rollout_correction.bypass_mode=true",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
    )
    assert_trained(steps)


@FULL
@pytest.mark.parametrize("recipe", ["run_entropy_top20.sh", "run_dapo_14b_entropy_top20.sh"])
def test_recipes(files: Path, tmp_path: Path, recipe: str) -> None:
    overrides = [*NO_GPU]
    if "dapo" in recipe:
        overrides += ["reward.reward_kwargs.max_resp_len=24", "reward.reward_kwargs.overlong_buffer_cfg.len=8"]
    assert_trained(train([str(RECIPES / recipe)], files, tmp_path, *overrides))
