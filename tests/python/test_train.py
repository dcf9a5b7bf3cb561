"""The trainer, from its command line to the gradient."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_rl import config as configuration
from entropy_rl import lm_head, selection, train
from entropy_rl.report.rollouts import read_rollouts
from entropy_rl.tasks import Problem, load_tasks
from training import ACTOR, as_arguments

Run = Callable[..., list[dict[str, Any]]]
Overrides = dict[str, Any]


@pytest.fixture
def model(config: Any) -> Any:
    return train.load_model(config.actor_rollout_ref.model, config.actor_rollout_ref.model.path)


@pytest.fixture
def tokenizer(config: Any) -> Any:
    return train.load_tokenizer(config.actor_rollout_ref.model)


# ---- Complete runs


def test_command_line_trains_on_parquet_with_math_verify(
    overrides: Overrides, problems_path: Path, tmp_path: Path
) -> None:
    """The documented command writes every file, logs every step, and saves a model that transformers loads."""
    del overrides["reward.custom_reward_function.path"]
    overrides |= {
        "data.val_files": problems_path,
        "data.val_max_samples": 4,
        "trainer.total_training_steps": 2,
        "trainer.test_freq": 1,
        "trainer.save_freq": 2,
        "trainer.logger": "[console,file,tensorboard]",
    }
    result = subprocess.run(
        [sys.executable, "-m", "entropy_rl.train", *as_arguments(overrides)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "run"
    assert "critic/rewards/mean" in result.stderr + result.stdout
    assert "val-core/sums/reward/mean@1" in (directory / "metrics.jsonl").read_text()
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((directory / "tensorboard").glob("events.out.tfevents.*"))

    saved = directory / "global_step_2/actor/huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer("1 + 1 =", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_metrics_have_verls_names(run: Run) -> None:
    (line,) = run({f"{ACTOR}.use_kl_loss": "true", f"{ACTOR}.entropy_coeff": 0.01})
    assert line["step"] == 1
    expected = {
        "actor/entropy",
        "actor/entropy_loss",
        "actor/entropy_threshold",
        "actor/entropy_token_ratio",
        "actor/entropy_token_ratio/max",
        "actor/entropy_token_ratio/min",
        "actor/grad_norm",
        "actor/kl_loss",
        "actor/loss",
        "actor/lr",
        "actor/pg_clipfrac",
        "actor/pg_clipfrac_lower",
        "actor/pg_loss",
        "actor/ppo_kl",
        "critic/advantages/mean",
        "critic/rewards/mean",
        "critic/score/max",
        "perf/throughput",
        "prompt_length/mean",
        "response_length/clip_ratio",
        "response_length/mean",
        "timing_s/gen",
        "timing_s/old_log_prob",
        "timing_s/ref",
        "timing_s/step",
        "timing_s/update_actor",
        "training/epoch",
        "training/global_step",
    }
    assert expected <= line["data"].keys()
    assert all(math.isfinite(value) for value in line["data"].values())


def test_selected_share_is_the_configured_one(run: Run) -> None:
    """Each of four micro-batches, of at most 32 response tokens, rounds the share of 0.2 up."""
    (line,) = run()
    assert 0.2 <= line["data"]["actor/entropy_token_ratio"] < 0.2 + 1 / 8
    assert line["data"]["actor/entropy_threshold"] > 0


def test_each_response_trains_on_its_own_share(run: Run) -> None:
    """A response has at most 8 tokens, of which 0.2 are 1 or 2; the share of the batch is between the extremes."""
    scope = {f"{ACTOR}.entropy_top_scope": "sequence", "trainer.total_training_steps": 2}
    for line in run(scope):
        lowest, highest = (line["data"][f"actor/entropy_token_ratio/{end}"] for end in ("min", "max"))
        assert 0.2 <= lowest <= line["data"]["actor/entropy_token_ratio"] <= highest <= 1
        assert lowest in [pytest.approx(math.ceil(n / 5) / n) for n in range(1, 9)]


def test_a_random_control_has_as_many_tokens(run: Run, tmp_path: Path) -> None:
    """Two runs of a seed select the same tokens, and another seed selects others."""
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        changes = {f"{ACTOR}.entropy_top_score": "random", f"{ACTOR}.data_loader_seed": seed}
        (line,) = run(changes | {"trainer.default_local_dir": tmp_path / str(number)})
        assert 0.2 <= line["data"]["actor/entropy_token_ratio"] < 0.2 + 1 / 8
        assert "actor/entropy_threshold" not in line["data"] and 0 < line["data"]["actor/score_threshold"] < 1
        losses.append(line["data"]["actor/grad_norm"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("key", "body", "message"),
    [
        ("entropy_top_score", "return entropy.mean()", "it returned a float32 tensor of shape []"),
        ("token_weight", "return entropy - 100", "it returned a weight below 0 or not finite for "),
    ],
)
def test_a_function_that_is_wrong_ends_the_run_with_one_line(
    key: str, body: str, message: str, overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def f(log_prob, entropy, advantages, response_mask):\n    {body}\n")
    assert train.main(as_arguments(overrides | {f"{ACTOR}.{key}": f"{file}:f"})) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith(f"error: {key}={file}:f: {message}")


def test_without_a_ratio_nothing_is_selected(run: Run) -> None:
    (line,) = run({f"{ACTOR}.entropy_top_ratio": "null"})
    assert not {"actor/entropy_token_ratio", "actor/entropy_threshold"} & line["data"].keys()


@pytest.mark.filterwarnings("ignore:entropy_mask is not applied")
@pytest.mark.parametrize("loss_mode", configuration.LOSS_MODES)
def test_every_loss_mode_trains(loss_mode: str, run: Run, model: Any, tmp_path: Path) -> None:
    (line,) = run(
        {
            f"{ACTOR}.policy_loss.loss_mode": loss_mode,
            f"{ACTOR}.policy_loss.dro_beta": 0.1,
            "trainer.save_freq": 1,
        }
    )
    assert 0 < line["data"]["actor/grad_norm"] < math.inf
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/global_step_1/actor/huggingface")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize("loss_agg_mode", configuration.LOSS_AGG_MODES)
def test_every_aggregation_trains(loss_agg_mode: str, run: Run) -> None:
    (line,) = run({f"{ACTOR}.loss_agg_mode": loss_agg_mode, f"{ACTOR}.use_kl_loss": "true"})
    assert 0 < line["data"]["actor/grad_norm"] < math.inf


@pytest.mark.parametrize("estimator", configuration.ADV_ESTIMATORS)
def test_every_advantage_estimator_trains(estimator: str, run: Run) -> None:
    (line,) = run({"algorithm.adv_estimator": estimator})
    assert 0 < line["data"]["actor/grad_norm"] < math.inf


def test_other_settings_train(run: Run) -> None:
    """Settings that the tests above leave at their defaults."""
    lines = run(
        {
            "actor_rollout_ref.model.enable_gradient_checkpointing": "true",
            f"{ACTOR}.fsdp_config.dtype": "bfloat16",
            f"{ACTOR}.ppo_epochs": 2,
            f"{ACTOR}.shuffle": "true",
            f"{ACTOR}.entropy_top_rule": "quantile",
            f"{ACTOR}.entropy_top_normalize": "response",
            f"{ACTOR}.optim.lr_scheduler_type": "cosine",
            f"{ACTOR}.optim.lr_warmup_steps": 1,
            "actor_rollout_ref.rollout.top_p": 0.9,
            "actor_rollout_ref.rollout.top_k": 20,
            "actor_rollout_ref.rollout.temperature": 0.8,
            "actor_rollout_ref.rollout.max_num_seqs": 5,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 3,
            "trainer.total_training_steps": 2,
        }
    )
    assert [line["data"]["actor/lr"] for line in lines] == [0.0, 1e-3]


def test_problems_without_spread_are_counted(model: Any, config: Any) -> None:
    """Four problems with two responses each: the rewards of two problems do not differ."""
    config.actor_rollout_ref.rollout.n = 2
    experience = random_experience(model, config)
    rewards = torch.tensor([0.1, 0.1, 0.0, 1.0, 0.5, 0.25, 0.0, 0.0])
    advantage = train.compute_advantages(rewards, experience.batch.response_mask, config)
    metrics = train.batch_metrics(experience.batch, rewards, {}, advantage, experience.old_entropy, config)
    assert metrics["critic/rewards/zero_std_ratio"] == 0.5
    config.actor_rollout_ref.rollout.n = 1
    metrics = train.batch_metrics(experience.batch, rewards, {}, advantage, experience.old_entropy, config)
    assert "critic/rewards/zero_std_ratio" not in metrics


def test_a_run_that_cannot_learn_says_so_and_shows_samples(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """math-verify gives every random response the reward 0."""
    lines = run(
        {
            "reward.custom_reward_function.path": "null",
            "trainer.total_training_steps": 2,
            "trainer.logger": "[console,file]",
        }
    )
    for line in lines:
        assert line["data"]["critic/rewards/zero_std_ratio"] == 1 and line["data"]["actor/grad_norm"] == 0
    shown = capsys.readouterr()
    assert shown.err.count("warning: step 1: the policy gradient is 0") == 1 and "warning: step 2" not in shown.err
    for step in (1, 2):  # the first and the last
        assert shown.out.count(f"step {step}, a response with reward 0 to: ") == 2
        assert len((tmp_path / f"run/samples/{step}.jsonl").read_text().splitlines()) == 2
    saved = OmegaConf.load(tmp_path / "run/config.yaml")
    assert saved.actor_rollout_ref.actor.entropy_top_ratio == 0.2 and saved.data.shuffle is True


@pytest.mark.parametrize(
    "change",
    [
        {},
        {f"{ACTOR}.entropy_top_scope": "mini_batch", f"{ACTOR}.shuffle": "true"},
        {f"{ACTOR}.ppo_epochs": 2, f"{ACTOR}.entropy_top_ratio": 0.5},
        {f"{ACTOR}.entropy_top_ratio": "null"},
        {f"{ACTOR}.policy_loss.loss_mode": "gspo"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:entropy_mask is not applied")
def test_responses_are_written(change: Overrides, run: Run, tokenizer: Any, tmp_path: Path) -> None:
    """Those of every step, for `entropy-rl inspect`: what was sampled, its rewards, and the tokens that trained."""
    directory = tmp_path / "rollouts"
    settings = {f"{ACTOR}.ppo_mini_batch_size": 4, "trainer.total_training_steps": 2}
    lines = run({"trainer.rollout_data_dir": directory, **settings, **change})
    written = read_rollouts(directory)
    for line in lines:
        rows, data = [row for row in written if row.step == line["step"]], line["data"]
        lengths = [len(row.tokens) for row in rows]
        assert len(rows) == 16 and [row.input for row in rows[:4]] == [rows[0].input] * 4
        assert sum(lengths) / 16 == pytest.approx(data["response_length/mean"])
        assert sum(row.score or 0.0 for row in rows) / 16 == pytest.approx(data["critic/rewards/mean"])
        entropies = torch.tensor([e for row in rows for e in row.entropies or []])
        assert entropies.mean() == pytest.approx(data["actor/entropy"], rel=1e-5)
        for percent in (50, 80, 95, 99):
            k = math.ceil(len(entropies) * (100 - percent) / 100)
            assert entropies.topk(k).values[-1] == pytest.approx(data[f"actor/entropy_p{percent}"])
        for row in rows:
            assert tokenizer.decode(row.token_ids, skip_special_tokens=True) == row.output
            assert row.log_probs is not None and max(row.log_probs) < 0 and row.data_source == "sums"
        assert sum(row.advantage or 0.0 for row in rows) == pytest.approx(0, abs=1e-4)
        if change.get(f"{ACTOR}.entropy_top_ratio") == "null":
            assert all(row.selected is None for row in rows)
            continue
        share = sum(sum(row.selected or []) for row in rows) / sum(lengths)
        if "gspo" in change.values():
            assert share == 1
        elif f"{ACTOR}.ppo_epochs" not in change:  # the file has the last pass, the metric all of them
            assert share == pytest.approx(data["actor/entropy_token_ratio"])


def test_the_written_selection_is_that_of_the_update(run: Run, tmp_path: Path) -> None:
    """On the first step of one optimizer step over the whole batch: the tokens of highest written entropy."""
    changes = {
        f"{ACTOR}.ppo_mini_batch_size": 4,
        f"{ACTOR}.entropy_top_scope": "mini_batch",
        f"{ACTOR}.entropy_top_source": "old_policy",
    }
    (line,) = run({"trainer.rollout_data_dir": tmp_path / "rollouts", **changes})
    rows = read_rollouts(tmp_path / "rollouts")
    pairs = [pair for row in rows for pair in zip(row.entropies or [], row.selected or [], strict=True)]
    lowest = min(entropy for entropy, chosen in pairs if chosen)
    assert lowest == pytest.approx(line["data"]["actor/entropy_threshold"])
    assert all(chosen == (entropy >= lowest) for entropy, chosen in pairs) and 0 < sum(c for _, c in pairs) < len(pairs)


def test_a_directory_for_responses_that_cannot_be_made(
    overrides: Overrides, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(as_arguments(overrides | {"trainer.rollout_data_dir": "/proc/rollouts"})) == 2
    assert "error: trainer.rollout_data_dir=/proc/rollouts: it cannot be created" in capsys.readouterr().err


def test_the_entropy_histogram_counts_all_finite_values(model: Any, config: Any) -> None:
    experience = random_experience(model, config)
    entropy, mask = experience.old_entropy.clone(), experience.batch.response_mask
    entropy[0, 0] = math.nan
    values = entropy[mask][1:].double()
    found = train.entropy_histogram(entropy, mask)
    assert found.end == values.max().item() and sum(found.counts) == len(values)
    assert (found.total, found.squares) == pytest.approx((values.sum().item(), (values**2).sum().item()))
    edges = torch.linspace(0, found.end, 65, dtype=torch.float64)
    for i in (0, 31, 63):
        inside = (values >= edges[i]) & ((values < edges[i + 1]) | (i == 63))
        assert found.counts[i] == inside.sum()
    assert sum(train.entropy_histogram(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).counts) == 0


def test_samples_are_those_with_the_lowest_and_the_highest_reward(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run({"trainer.total_training_steps": 3, "trainer.log_samples_freq": 2})
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["1.jsonl", "2.jsonl", "3.jsonl"]
    for line in lines:
        rows = [row for row in read_rollouts(tmp_path / "run/samples") if row.step == line["step"]]
        ends = [line["data"][f"critic/rewards/{end}"] for end in ("min", "max")]
        assert sorted(row.score for row in rows if row.score is not None) == pytest.approx(ends)
    assert "warning" not in capsys.readouterr().err
    run({"trainer.log_samples_freq": -1, "trainer.default_local_dir": tmp_path / "silent"})
    assert not (tmp_path / "silent/samples").exists()


def test_learns_what_is_rewarded(run: Run) -> None:
    """The mean reward, the share of digits, rises in twelve steps on a fifth of the tokens."""
    lines = run({"trainer.total_training_steps": 12, "data.train_batch_size": 16, f"{ACTOR}.optim.lr": 1e-2})
    rewards = [line["data"]["critic/rewards/mean"] for line in lines]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])


# ---- Data order


def test_an_epoch_meets_every_problem_once(config: Any) -> None:
    examples: Any = [(number, []) for number in range(10)]
    epochs = [
        [example[0] for step in steps for example in train.batch_of_step(examples, step, config.data)]
        for steps in ((1, 2), (3, 4))
    ]
    for met in epochs:
        assert len(set(met)) == 8  # two batches of four; this order leaves two problems out
    assert epochs[0] != epochs[1]


def test_prompts_that_are_too_long_are_dropped(config: Any, tokenizer: Any) -> None:
    """Of 16 prompts of 7 to 10 characters, those of at most 9 remain."""
    problems, _, _ = load_tasks(config)
    lengths = [len(problem.messages[0]["content"]) for problem in problems]
    config.data.max_prompt_length, config.data.filter_overlong_prompts = 9, True
    kept = train.encode(tokenizer, problems, config)
    assert [len(prompt) for _, prompt in kept] == [length for length in lengths if length <= 9]
    assert 0 < len(kept) < 16


def test_a_prompt_without_tokens(config: Any, tokenizer: Any) -> None:
    problem = Problem([{"role": "user", "content": ""}], "sums", "1")
    with pytest.raises(configuration.ConfigError, match="a prompt has no tokens"):
        train.encode(tokenizer, [problem], config)


# ---- Validation


def test_validation_is_a_mean_over_each_source(run: Run, problems_path: Path) -> None:
    """Two responses to each of five problems, three problems at a time, before the first step and after the last."""
    settings = {"data.val_files": problems_path, "data.val_max_samples": 5, "data.val_batch_size": 3}
    settings |= {"actor_rollout_ref.rollout.val_kwargs.n": 2}
    settings |= {"actor_rollout_ref.rollout.val_kwargs.temperature": 1.0}
    first, last = run(settings)
    name = "val-core/sums/reward/mean@2"
    assert (first["step"], last["step"]) == (0, 1)
    assert first["data"].keys() == {name} and 0 <= last["data"][name] <= 1


# ---- Sampling


def test_generate_agrees_with_transformers(model: Any, tokenizer: Any, config: Any) -> None:
    """Greedy sampling from prompts of different lengths checks the cache, the padding on the left and the positions."""
    prompts = [tokenizer.encode(text) for text in ("1 + 1 =", "12345 * 6789 =", "7")]
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    batch = train.generate(model, tokenizer, prompts, config, sampling, torch.Generator())
    for row, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert batch.responses[row][batch.response_mask[row]].tolist() == expected.tolist()


def test_a_response_ends_with_its_end_token(model: Any, tokenizer: Any, config: Any) -> None:
    prompts = [tokenizer.encode(f"{number} =") for number in range(64)]
    batch = train.generate(
        model, tokenizer, prompts, config, config.actor_rollout_ref.rollout, torch.Generator().manual_seed(0)
    )
    ended = 0
    for response, mask in zip(batch.responses.tolist(), batch.response_mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert 1 not in response[: length - 1]
        assert length == 8 or response[length - 1] == 1
        ended += length < 8
    assert ended, "the seed must show a response that ends early"


def test_sample_follows_the_distribution(config: Any) -> None:
    """20,000 draws at temperature 2 are within five standard deviations of softmax(logits / 2)."""
    sampling = config.actor_rollout_ref.rollout
    sampling.temperature = 2.0
    logits = torch.tensor([1.0, 0.0, -1.0, 3.0])
    drawn = train.sample(logits.expand(20_000, 4), sampling, torch.Generator().manual_seed(0))
    p = (logits / 2).softmax(-1)
    assert ((drawn.bincount(minlength=4) / 20_000 - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    ("top_p", "top_k", "possible"),
    [
        (1.0, -1, {0, 1, 2, 3}),
        (0.51, -1, {0, 1}),
        (0.45, -1, {0}),
        (0.01, -1, {0}),  # the most probable token is always kept
        (1.0, 3, {0, 1, 2}),
        (1.0, 9, {0, 1, 2, 3}),  # more than the vocabulary has
        (0.9, 2, {0, 1}),
    ],
)
def test_top_p_and_top_k(top_p: float, top_k: int, possible: set[int], config: Any) -> None:
    sampling = config.actor_rollout_ref.rollout
    sampling.top_p, sampling.top_k = top_p, top_k
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = train.sample(logits.expand(2000, 4), sampling, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == possible


# ---- Log-probabilities and gradients


def random_experience(model: Any, config: Any, rows: int = 8, width: int = 5, length: int = 6) -> train.Experience:
    """Responses of different lengths, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[1] = 0
    mask = torch.arange(length) < lengths[:, None]
    tokens = torch.randint(2, 97, (rows, width + length), generator=generator)
    attention = torch.cat([torch.arange(width) >= width - prompt_lengths[:, None], mask], -1).long()
    batch = train.Batch(tokens, attention, mask)
    old_log_prob, old_entropy = train.compute_log_prob(model, batch, config)
    noise = 0.3 * torch.randn(old_log_prob.shape, generator=generator)
    advantage = torch.randn(rows, 1, generator=generator).expand(-1, length)
    return train.Experience(batch, advantage, old_log_prob + noise, old_log_prob, old_entropy)


def plain_log_prob_and_entropy(model: Any, batch: train.Batch, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one response, without padding, in plain torch."""
    inside = batch.attention_mask[row].bool()
    tokens = batch.tokens[row][inside]
    count = int(batch.response_mask[row].sum())
    logits = model(tokens[None]).logits[0, len(tokens) - count - 1 : -1] / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, tokens[len(tokens) - count :, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_log_prob_is_that_of_the_response_without_padding(model: Any, config: Any) -> None:
    config.actor_rollout_ref.rollout.temperature = 0.7
    batch = random_experience(model, config).batch
    log_prob, entropy = train.compute_log_prob(model, batch, config)
    for row in range(len(log_prob)):
        expected = plain_log_prob_and_entropy(model, batch, row, 0.7)
        inside = batch.response_mask[row]
        torch.testing.assert_close(log_prob[row][inside], expected[0].detach(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(entropy[row][inside], expected[1].detach(), atol=1e-4, rtol=1e-5)
        assert not log_prob[row][~inside].any() and not entropy[row][~inside].any()


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "geo_mean", "sapo"])
@pytest.mark.parametrize("loss_agg_mode", configuration.LOSS_AGG_MODES)
def test_gradient_does_not_depend_on_the_micro_batches(
    loss_mode: str, loss_agg_mode: str, model: Any, config: Any
) -> None:
    """All tokens train, with a KL penalty and an entropy bonus. Every mean is over the mini-batch."""
    actor = config.actor_rollout_ref.actor
    actor.entropy_top_ratio, actor.entropy_coeff = None, 0.1
    actor.policy_loss.loss_mode, actor.loss_agg_mode = loss_mode, loss_agg_mode
    experience = random_experience(model, config)
    results = []
    for size in (8, 2):
        actor.ppo_micro_batch_size_per_gpu = size
        metrics = train.accumulate_gradients(model, experience, torch.Generator(), config)
        results.append((gradients(model), metrics))
    for whole, parts in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
@pytest.mark.parametrize("normalize", ["selected", "response"])
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("size", [8, 2])
def test_gradient_is_the_mean_over_the_selected_tokens(
    rule: str, normalize: str, size: int, complement: bool, model: Any, config: Any
) -> None:
    """Equals plain torch: PPO's clipped objective on the tokens that each micro-batch selects, divided once."""
    actor = config.actor_rollout_ref.actor
    actor.entropy_top_complement = complement
    actor.entropy_top_rule, actor.entropy_top_normalize = rule, normalize
    actor.ppo_micro_batch_size_per_gpu = size
    experience = random_experience(model, config)
    batch = experience.batch
    train.accumulate_gradients(model, experience, torch.Generator(), config)
    found = gradients(model)

    parts, counts, response_tokens = [], [], 0
    for begin in range(0, 8, size):
        losses, entropies = [], []
        for row in range(begin, begin + size):
            log_prob, entropy = plain_log_prob_and_entropy(model, batch, row, 1.0)
            inside = batch.response_mask[row]
            advantage = experience.advantages[row][inside]
            ratio = (log_prob - experience.old_log_prob[row][inside]).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            losses.append(torch.where(advantage < 0, torch.minimum(loss, -advantage * 3), loss))
            entropies.append(entropy.detach())
        loss, entropy = torch.cat(losses), torch.cat(entropies)
        count = max(1, int(len(entropy) * 0.2 + 0.9999))
        lowest = entropy.quantile(0.8) if rule == "quantile" else entropy.sort(descending=True).values[count - 1]
        parts.append(loss[(entropy >= lowest) != complement])
        counts.append(len(entropy) - count if complement else count)
        response_tokens += len(entropy)
    if normalize == "selected":
        # A micro-batch may select nothing.
        total = sum(part.sum() / max(1, len(part)) * count for part, count in zip(parts, counts, strict=True)) / sum(
            counts
        )
    else:
        total = sum(part.sum() for part in parts) / response_tokens
    total.backward()
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---- A gradient that is not finite


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("advantages", "advantages (check the rewards): 1 of 24 tokens; loss"),
        ("model", "log-probabilities: 24 of 24 tokens; entropies: 24 of 24 tokens; loss"),
        ("backward", "the loss and what it is computed from are finite, so the backward is the cause"),
    ],
)
def test_the_cause_of_a_gradient_that_is_not_finite_is_named(
    cause: str, message: str, model: Any, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimizer step is skipped, and one line names the numbers that are not finite."""
    experience = random_experience(model, config)
    config.actor_rollout_ref.actor.entropy_top_ratio, config.actor_rollout_ref.rollout.n = None, 8
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
    experience.ref_log_prob = None
    experience.advantages = experience.advantages.clone()
    if cause == "advantages":
        experience.advantages[0, 0] = math.nan
    elif cause == "model":
        with torch.no_grad():
            model.get_input_embeddings().weight[5] = math.nan  # which the LM head shares
    else:
        model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    train.update(model, optimizer, experience, 3, 5, config)
    shown = capsys.readouterr().err
    assert shown == f"step 3: optimizer step skipped, its gradient is not finite: {message}\n"
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


# ---- A selection before the optimizer step


def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the LM head with a gradient computes."""
    counts: list[int] = []
    op = lm_head.linear_logprob_entropy

    def counting(hidden: Tensor, *arguments: Any, mask: Tensor, **options: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            counts.append(int(mask.sum()))
        return op(hidden, *arguments, mask=mask, **options)

    monkeypatch.setattr(lm_head, "linear_logprob_entropy", counting)
    return counts


TOKEN_MODES = [mode for mode in configuration.LOSS_MODES if mode not in selection.SEQUENCE_MODES]
PRESELECTED = [
    *((mode, "token-mean", "selected", 8, False) for mode in TOKEN_MODES),
    *(("vanilla", mode, "selected", 2, False) for mode in configuration.LOSS_AGG_MODES),
    ("vanilla", "seq-mean-token-mean", "response", 2, False),
    # All tokens except the top fifth.
    ("vanilla", "token-mean", "selected", 8, True),
    ("vanilla", "seq-mean-token-mean", "response", 2, True),
]


@pytest.mark.parametrize("source", ["prepass", "old_policy"])
@pytest.mark.parametrize(("loss_mode", "loss_agg_mode", "normalize", "size", "complement"), PRESELECTED)
def test_the_lm_head_on_selected_tokens_only_gives_the_same_step(
    source: str,
    loss_mode: str,
    loss_agg_mode: str,
    normalize: str,
    size: int,
    complement: bool,
    model: Any,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that runs the LM head on the selected tokens only equals one that runs it on all tokens."""
    actor = config.actor_rollout_ref.actor
    actor.entropy_top_scope, actor.entropy_top_source, actor.entropy_top_normalize = "mini_batch", source, normalize
    actor.policy_loss.loss_mode, actor.loss_agg_mode, actor.policy_loss.dro_beta = loss_mode, loss_agg_mode, 0.1
    actor.ppo_micro_batch_size_per_gpu, actor.entropy_top_complement = size, complement
    experience = random_experience(model, config)
    experience.ref_log_prob = None
    rows = head_rows(monkeypatch)
    results = []
    for reason in (None, "this test"):
        monkeypatch.setattr(train, "needs_all_tokens", lambda actor, reason=reason: reason)
        metrics = train.accumulate_gradients(model, experience, torch.Generator(), config)
        results.append((gradients(model), metrics))
    (found, metrics), (expected, all_metrics) = results
    tokens, steps = int(experience.batch.response_mask.sum()), len(rows) // 2
    top = max(1, int(tokens * 0.2 + 0.9999))
    assert sum(rows[:steps]) == (tokens - top if complement else top) and sum(rows[steps:]) == tokens
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    moved = selection.movement_metrics(loss_mode) & all_metrics.keys()
    changed = moved if source == "old_policy" else set()
    assert metrics.keys() == {f"{name}_selected" if name in changed else name for name in all_metrics}
    for name in all_metrics.keys() - changed:
        torch.testing.assert_close(metrics[name], all_metrics[name], atol=1e-6, rtol=1e-4, msg=name)


WEIGHTED = [
    {"entropy_veto": {"probability": 0.5, "entropy": 4.07}, "entropy_top_ratio": 1.0},
    {"token_weight": f"{Path(__file__).with_name('training.py')}:only_high_entropies", "entropy_rest": {"weight": 0.1}},
]


@pytest.mark.parametrize("weights", WEIGHTED, ids=lambda weights: next(iter(weights)))
def test_the_lm_head_skips_tokens_of_weight_zero(
    weights: dict[str, Any], model: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = config.actor_rollout_ref.actor
    actor.entropy_top_scope, actor.ppo_micro_batch_size_per_gpu = "mini_batch", 2
    actor.merge_with(weights)
    experience = random_experience(model, config)
    experience.ref_log_prob = None
    rows = head_rows(monkeypatch)
    results = []
    for reason in (None, "this test"):
        monkeypatch.setattr(train, "needs_all_tokens", lambda actor, reason=reason: reason)
        train.accumulate_gradients(model, experience, torch.Generator(), config)
        results.append(gradients(model))
    log_prob, entropy = train.compute_log_prob(model, experience.batch, config)
    zero = entropy < 4.07
    if "entropy_veto" in weights:
        zero = (experience.advantages > 0) & (log_prob.exp() < 0.5) & (entropy < 4.07)
    inside = experience.batch.response_mask
    assert 0 < (zero & inside).sum() < inside.sum()
    assert sum(rows[:4]) == (inside & ~zero).sum() and sum(rows[4:]) == inside.sum()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_metrics_of_the_selected_tokens(model: Any, config: Any) -> None:
    """With old_policy, ppo_kl and the clip fractions are means over the selected tokens, and their names say so."""
    actor = config.actor_rollout_ref.actor
    actor.entropy_top_scope, actor.entropy_top_source = "mini_batch", "old_policy"
    actor.ppo_micro_batch_size_per_gpu = 2
    experience = random_experience(model, config)
    experience.ref_log_prob = None
    metrics = train.accumulate_gradients(model, experience, torch.Generator(), config)
    step, rows = selection.StepSelection(actor), torch.arange(8).split(2)
    parts = train.select_before_step(model, experience, rows, step, 0, config)
    selected = torch.cat([part.mask for part in parts])
    log_prob, _ = train.compute_log_prob(model, experience.batch, config)
    moved = (experience.old_log_prob - log_prob)[selected]
    ratio, advantage = (-moved).exp(), experience.advantages[selected]
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    assert clipped.any() and not clipped.all()
    torch.testing.assert_close(metrics["actor/ppo_kl_selected"], moved.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics["actor/pg_clipfrac_selected"], clipped.float().mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{ACTOR}.use_kl_loss": "true"}, "use_kl_loss=true"),
        ({f"{ACTOR}.entropy_coeff": 0.01}, "entropy_coeff=0.01"),
        ({f"{ACTOR}.policy_loss.loss_mode": "clip_cov"}, None),
        ({f"{ACTOR}.policy_loss.loss_mode": "gspo"}, "policy_loss.loss_mode=gspo"),
        ({}, None),
        ({f"{ACTOR}.entropy_top_scope": "micro_batch"}, None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:entropy_mask is not applied")
def test_a_run_that_needs_the_lm_head_on_all_tokens_says_why(
    change: Overrides,
    reason: str | None,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = head_rows(monkeypatch)
    (line,) = run({f"{ACTOR}.entropy_top_scope": "mini_batch", f"{ACTOR}.entropy_top_source": "old_policy"} | change)
    shown = capsys.readouterr().out
    assert ("runs the LM head on all response tokens" in shown) == (reason is not None)
    assert reason is None or f"because {reason} needs them all" in shown
    # Sixteen responses of at most 8 tokens.
    tokens = round(16 * line["data"]["response_length/mean"])
    few = reason is None and change.get(f"{ACTOR}.entropy_top_scope") != "micro_batch"
    assert sum(rows) < 0.25 * tokens + 2 if few else sum(rows) == tokens
