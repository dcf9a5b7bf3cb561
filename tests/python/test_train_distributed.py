"""The trainer on several ranks: an optimizer step does not depend on its split, and how runs resume and end."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributed.tensor import DTensor

from entropy_rl import checkpoint, distributed, logs, train
from entropy_rl import config as configuration
from entropy_rl.report.rollouts import read_rollouts
from entropy_rl.selection import StepSelection, movement_metrics
from ranks import Ranks
from training import ACTOR, as_arguments, read_metrics, without_times

Overrides = dict[str, Any]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    """Two ranks, and four."""
    pools = {size: Ranks(size, tmp_path_factory.mktemp("ranks")) for size in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, pools: dict[int, Ranks]) -> Ranks:
    return pools[request.param]


# ---- One optimizer step


def make_experience(rows: int = 16, width: int = 5, length: int = 6) -> train.Experience:
    """Responses of different lengths; those of the last rank of four are empty."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[-rows // 4 :] = 0
    mask = torch.arange(length) < lengths[:, None]
    tokens = torch.randint(2, 97, (rows, width + length), generator=generator)
    attention = torch.cat([torch.arange(width) >= width - prompt_lengths[:, None], mask], -1).long()
    log_prob, entropy = torch.randn(2, rows, length, generator=generator).abs()
    advantage = torch.randn(rows, 1, generator=generator).expand(-1, length)
    return train.Experience(train.Batch(tokens, attention, mask), advantage, -4 - log_prob, -4 + log_prob, entropy)


def step(arguments: list[str], micro_batch_size: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of this rank's share of the mini-batch."""
    config = configuration.load(arguments)
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = micro_batch_size
    model = train.load_model(config.actor_rollout_ref.model, config.actor_rollout_ref.model.path)
    model = distributed.distribute(model, config.actor_rollout_ref.actor.strategy, torch.device("cpu"))
    experience = make_experience()
    if not config.actor_rollout_ref.actor.use_kl_loss:
        experience.ref_log_prob = None
    own = len(experience.advantages) // distributed.size()
    share = experience.rows(torch.arange(own) + own * distributed.rank())
    metrics = train.accumulate_gradients(model, share, torch.Generator(), config)
    norm = distributed.full_norm(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()))
    gradients = {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    return gradients, {name: value.item() for name, value in metrics.items()} | {"norm": norm.item()}


CASES = {
    "topk": {},
    "threshold": {f"{ACTOR}.entropy_top_rule": "threshold"},
    "quantile, response": {f"{ACTOR}.entropy_top_rule": "quantile", f"{ACTOR}.entropy_top_normalize": "response"},
    "old policy": {f"{ACTOR}.entropy_top_source": "old_policy"},
    "KL and bonus": {f"{ACTOR}.use_kl_loss": "true", f"{ACTOR}.entropy_coeff": 0.1},
    "means over rows": {f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"},
    "sums over rows": {f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"},
    # A clip ratio at which nothing is clipped leaves more tokens to draw from than are drawn.
    "clip_cov": {
        f"{ACTOR}.policy_loss.loss_mode": "clip_cov",
        f"{ACTOR}.policy_loss.clip_cov_ratio": 0.2,
        f"{ACTOR}.policy_loss.clip_cov_lb": -0.5,
        f"{ACTOR}.clip_ratio": 30.0,
    },
    "kl_cov": {f"{ACTOR}.policy_loss.loss_mode": "kl_cov", f"{ACTOR}.policy_loss.kl_cov_ratio": 0.2},
    "gspo": {f"{ACTOR}.policy_loss.loss_mode": "gspo"},
    "geo_mean": {f"{ACTOR}.policy_loss.loss_mode": "geo_mean"},
    "all but the top": {f"{ACTOR}.entropy_top_complement": "true"},
    "surprisal": {f"{ACTOR}.entropy_top_score": "surprisal"},
    "random": {f"{ACTOR}.entropy_top_score": "random"},
    "a function": {f"{ACTOR}.entropy_top_score": f"{Path(__file__).with_name('training.py')}:entropy_times_advantage"},
    "attenuated": {f"{ACTOR}.entropy_rest.weight": 0.3},
    "attenuated, means over rows": {
        f"{ACTOR}.entropy_rest.weight": 0.3,
        f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
    },
    "vetoed": {
        f"{ACTOR}.entropy_top_ratio": 1.0,
        f"{ACTOR}.entropy_veto.probability": 0.2,
        f"{ACTOR}.entropy_veto.entropy": 4.07,
    },
    "soft weights": {
        f"{ACTOR}.entropy_rest.weight": 0.5,
        f"{ACTOR}.token_weight": f"{Path(__file__).with_name('training.py')}:entropy_weight",
    },
    "dual-token constraints": {
        f"{ACTOR}.clip_ratio_high": 0.5,
        f"{ACTOR}.use_kl_loss": "true",
        f"{ACTOR}.kl_loss_coef": 0.0,
        f"{ACTOR}.entropy_rest.weight": 1.0,
        f"{ACTOR}.entropy_rest.clip_ratio_low": 0.1,
        f"{ACTOR}.entropy_rest.clip_ratio_high": 0.2,
        f"{ACTOR}.entropy_rest.kl_loss_coef": 0.1,
    },
    "each response": {f"{ACTOR}.entropy_top_scope": "sequence", f"{ACTOR}.entropy_top_ranks": "local"},
    "all tokens": {f"{ACTOR}.entropy_top_ratio": "null"},
}


@pytest.mark.filterwarnings("ignore:entropy_mask is not applied")
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("case", CASES)
def test_one_step_is_the_same_for_any_split(case: str, strategy: str, ranks: Ranks, overrides: Overrides) -> None:
    """Scope mini_batch with ranks global, and scope sequence: 16 responses at once on one rank equal 4 and 1 at a time
    on 2 and 4 ranks."""
    overrides |= {f"{ACTOR}.entropy_top_scope": "mini_batch", f"{ACTOR}.entropy_top_ranks": "global"}
    arguments = as_arguments(overrides | {f"{ACTOR}.strategy": strategy} | CASES[case])
    gradients, metrics = step(arguments, 16)
    assert metrics["norm"] > 0
    for size in (4, 1):
        for found, found_metrics in ranks.run(step, arguments, size):
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
            assert found_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("source", ["prepass", "old_policy"])
def test_the_lm_head_on_selected_tokens_only_gives_the_step_of_all_tokens(
    source: str, strategy: str, ranks: Ranks, overrides: Overrides
) -> None:
    """Ranks that run the LM head on the selected tokens only equal one rank that keeps all logits."""
    overrides |= {f"{ACTOR}.entropy_top_scope": "mini_batch", f"{ACTOR}.entropy_top_ranks": "global"}
    overrides |= {f"{ACTOR}.entropy_top_source": source, f"{ACTOR}.strategy": strategy}
    plain = as_arguments(overrides | {"actor_rollout_ref.model.use_fused_kernels": "false"})
    gradients, metrics = step(plain, 16)
    changed = movement_metrics("vanilla") if source == "old_policy" else set()
    for found, found_metrics in ranks.run(step, as_arguments(overrides), 2):
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert found_metrics.keys() == {f"{name}_selected" if name in changed else name for name in metrics}
        for name in metrics.keys() - changed:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def test_micro_batch_scope_means_what_it_says(ranks: Ranks, overrides: Overrides) -> None:
    """With ranks global, the micro-batches that the ranks run at once compete. One per rank is all of them."""
    overrides |= {f"{ACTOR}.entropy_top_ranks": "global"}
    gradients, metrics = step(as_arguments(overrides), 16)
    for found, found_metrics in ranks.run(step, as_arguments(overrides), 16):
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
        assert found_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    (_, local), *_ = ranks.run(step, as_arguments(overrides | {f"{ACTOR}.entropy_top_ranks": "local"}), 16)
    assert local["actor/entropy_token_ratio"] > metrics["actor/entropy_token_ratio"]  # rounded up on each rank


def test_prepass_and_old_policy_agree_before_the_first_step(overrides: Overrides) -> None:
    """Both run the same model on the same micro-batches, so their entropies have the same bits."""
    overrides |= {f"{ACTOR}.entropy_top_scope": "mini_batch"}
    results = []
    for source in ("prepass", "old_policy"):
        config = configuration.load(as_arguments(overrides | {f"{ACTOR}.entropy_top_source": source}))
        model = train.load_model(config.actor_rollout_ref.model, config.actor_rollout_ref.model.path)
        experience = make_experience()
        _, experience.old_entropy = train.compute_log_prob(model, experience.batch, config)
        rows = torch.arange(16).split(4)
        step = StepSelection(config.actor_rollout_ref.actor)
        parts = train.select_before_step(model, experience, rows, step, 0, config)
        results.append(torch.cat([part.mask for part in parts]))
    assert results[0].any() and torch.equal(*results)


# ---- Complete runs

Run = Callable[[int, Overrides], list[dict[str, Any]]]


def torchrun(processes: int, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "entropy_rl.train", *arguments),
    ]


def train_here(arguments: list[str]) -> tuple[int, str]:
    """The trainer's status and what it wrote to stderr, on a rank of a pool. It draws no curves (conftest.py)."""
    with mock.patch.object(logs, "_draw"), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = train.main(arguments)
    return status, errors.getvalue()


@pytest.fixture
def run(pools: dict[int, Ranks]) -> Run:
    """Trains on this process or on ranks that are running, which saves their start: the lines of metrics.jsonl."""

    def run_trainer(processes: int, overrides: Overrides) -> list[dict[str, Any]]:
        arguments = as_arguments(overrides)
        results = [train_here(arguments)] if processes == 1 else pools[processes].run(train_here, arguments)
        assert all(status == 0 for status, _ in results), results
        return read_metrics(Path(overrides["trainer.default_local_dir"]))

    return run_trainer


@pytest.fixture
def small_run(overrides: Overrides, problems_path: Path) -> Overrides:
    """Scope mini_batch, ranks global, four problems per mini-batch, and five problems for validation."""
    return overrides | {
        f"{ACTOR}.entropy_top_scope": "mini_batch",
        f"{ACTOR}.entropy_top_ranks": "global",
        f"{ACTOR}.ppo_mini_batch_size": 4,
        "data.val_files": problems_path,
        "data.val_max_samples": 5,
        "trainer.save_freq": 1,
    }


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_greedy_run_is_the_same_on_any_number_of_ranks(
    strategy: str, small_run: Overrides, run: Run, tmp_path: Path
) -> None:
    """Two steps on 1, 2 and 4 processes, without randomness in sampling, have the same metrics and final weights."""
    small_run |= {
        f"{ACTOR}.strategy": strategy,
        "actor_rollout_ref.rollout.top_k": 1,
        "algorithm.adv_estimator": "reinforce_plus_plus",  # the others give equal responses no advantage
        "trainer.total_training_steps": 2,
        f"{ACTOR}.use_kl_loss": "true",
    }
    small_run |= {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 2}
    directories = {size: tmp_path / str(size) for size in (1, 2, 4)}
    lines = {size: run(size, small_run | {"trainer.default_local_dir": path}) for size, path in directories.items()}
    for size in (2, 4):
        for line, expected in zip(lines[size], lines[1], strict=True):
            for name, value in expected["data"].items():
                if not name.startswith(("timing_s/", "perf/t")):
                    assert line["data"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert lines[1][-1]["data"]["actor/grad_norm"] > 0
    saved = {
        size: load_file(checkpoint.model_directory(path / "global_step_2") / "model.safetensors")
        for size, path in directories.items()
    }
    for size in (2, 4):
        assert saved[size].keys() == saved[1].keys()
        for name, weight in saved[1].items():
            # Where a gradient is only rounding error, so are its sign and the two steps of Adam at 1e-3.
            assert (saved[size][name] - weight).abs().mean() < 1e-5, name


def state_of(directory: Path, step: int) -> dict[str, Any]:
    return torch.load(directory / f"global_step_{step}/trainer.pt", weights_only=True)["optimizer"]["state"]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_resume_with_another_number_of_ranks(strategy: str, small_run: Overrides, run: Run, tmp_path: Path) -> None:
    """Two ranks, then one, then two again: each run resumes the weights and moments that the one before saved."""
    directory = tmp_path / "run"
    small_run |= {f"{ACTOR}.strategy": strategy, "trainer.default_local_dir": directory}
    settings = configuration.load(as_arguments(small_run)).actor_rollout_ref.model
    for step, processes in ((1, 2), (2, 1), (3, 2)):
        lines = run(processes, small_run | {"trainer.total_training_steps": step})
        assert [line["step"] for line in lines] == list(range(step + 1)), "steps are logged once, on one rank"
        moments = state_of(directory, step)
        assert {state["step"].item() for state in moments.values()} == {float(step)}
        saved = train.load_model(settings, checkpoint.model_directory(directory / f"global_step_{step}"))
        for name, weight in saved.named_parameters():
            assert moments[name]["exp_avg"].shape == weight.shape
    # A lost second moment would start again from a thousandth of the squared gradient.
    before, after = state_of(directory, 2), state_of(directory, 3)
    name = "model.norm.weight"
    assert (after[name]["exp_avg_sq"] >= 0.999 * before[name]["exp_avg_sq"] * (1 - 1e-6)).all()


def test_resume_on_as_many_ranks_is_the_uninterrupted_run(small_run: Overrides, run: Run, tmp_path: Path) -> None:
    """With random sampling and mini-batches in random order on two ranks, the weights have the same bits. torchrun
    starts the uninterrupted run, so that its bits are also those of ranks that were running already."""
    small_run |= {f"{ACTOR}.shuffle": "true", f"{ACTOR}.ppo_mini_batch_size": 2, "data.val_files": "null"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = small_run | {"trainer.total_training_steps": 2, "trainer.default_local_dir": whole}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(torchrun(2, *as_arguments(uninterrupted)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for step in (1, 2):
        run(2, small_run | {"trainer.total_training_steps": step, "trainer.default_local_dir": parts})
    weights = [checkpoint.model_directory(path / "global_step_2") / "model.safetensors" for path in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert without_times(read_metrics(whole)) == without_times(read_metrics(parts))


def test_ranks_write_their_responses_together(small_run: Overrides, run: Run, tmp_path: Path) -> None:
    """Greedy runs of one and two ranks write the same responses; percentiles and histograms are those of all."""
    directories, lines = {}, {}
    for processes in (1, 2):
        directories[processes] = tmp_path / f"rollouts{processes}"
        changes = {
            "trainer.rollout_data_dir": directories[processes],
            "trainer.default_local_dir": tmp_path / f"run{processes}",
            "trainer.total_training_steps": 1,
            "trainer.logger": "[file,tensorboard]",
            f"{ACTOR}.entropy_top_scope": "mini_batch",
            f"{ACTOR}.entropy_top_ranks": "global",
            "actor_rollout_ref.rollout.top_k": 1,
        }
        lines[processes] = run(processes, small_run | changes)[-1]["data"]
    one, two = (sorted(read_rollouts(path), key=lambda r: (r.input, r.output)) for path in directories.values())
    assert [(r.input, r.token_ids, r.score) for r in one] == [(r.input, r.token_ids, r.score) for r in two]
    entropies = [[e for r in rows for e in r.entropies or []] for rows in (one, two)]
    assert entropies[1] == pytest.approx(entropies[0], abs=1e-5)
    for percent in (50, 80, 95, 99):
        name = f"actor/entropy_p{percent}"
        assert lines[2][name] == pytest.approx(lines[1][name], abs=1e-5)
    histograms = [
        EventAccumulator(str(tmp_path / f"run{size}/tensorboard")).Reload().Histograms("actor/entropy")[0]
        for size in (1, 2)
    ]
    counts = [histogram.histogram_value for histogram in histograms]
    assert counts[0].num == counts[1].num == len(entropies[0])
    assert counts[1].sum == pytest.approx(counts[0].sum, rel=1e-5)


# ---- Ranks that die

# Writes its process id when it trains.
ANNOUNCE = """
import os, sys
from pathlib import Path
from entropy_rl import train

original = train.update
def update(*args):
    Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    return original(*args)
train.update = update
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_a_rank_that_dies_ends_the_run(machines: int, small_run: Overrides, tmp_path: Path) -> None:
    """After kill -9 of one of two ranks, on one machine or two, every torchrun fails within a minute."""
    script, pids = tmp_path / "announce.py", tmp_path / "pids"
    script.write_text(ANNOUNCE)
    pids.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    small_run |= {"trainer.total_training_steps": 100_000, "trainer.save_freq": -1, "trainer.val_before_train": "false"}
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *rendezvous),
                *("--nnodes", str(machines), "--nproc-per-node", str(2 // machines)),
                *(str(script), str(pids), *as_arguments(small_run)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(machines)
    ]
    try:
        deadline = time.monotonic() + 600
        while len(list(pids.iterdir())) < 2 or not all(path.read_text() for path in pids.iterdir()):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        of_rank = {path.name: int(path.read_text()) for path in pids.iterdir()}
        os.kill(of_rank["1"], signal.SIGKILL)
        killed = time.monotonic()
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert time.monotonic() - killed < 60
        assert all(process.returncode != 0 for process in processes)
        assert any("SIGKILL" in error or "Signal 9" in error for error in errors)
        assert not Path(f"/proc/{of_rank['0']}").exists(), "the other rank must not stay behind"
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)


def test_batches_that_ranks_cannot_share(small_run: Overrides, pools: dict[int, Ranks]) -> None:
    for change, message in (
        ({f"{ACTOR}.ppo_mini_batch_size": 1}, "ppo_mini_batch_size=1: the number of processes, 2, must divide it"),
        ({f"{ACTOR}.ppo_micro_batch_size_per_gpu": 16}, "rollout.n / processes = 8"),
        ({"trainer.n_gpus_per_node": 3}, "trainer.n_gpus_per_node=3, trainer.nnodes=1: torchrun started 2 processes"),
    ):
        for status, errors in pools[2].run(train_here, as_arguments(small_run | change)):
            assert status == 2 and message in errors
