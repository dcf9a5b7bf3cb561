"""Gradients of one optimizer step of verl's engine equal a plain statement of the masks and of Eq. 6's divisor."""

import itertools
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optimizer_step
import pytest
import task
import torch
from optimizer_step import CASES, LORA, TEMPERATURE, ULYSSES
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from architectures import CONFIGS as ARCHITECTURES
from entropy_rl.scores import random_scores
from entropy_rl_ext import covariance_mask
from vision_model import IMAGE, vision_config

TESTS = Path(__file__).parents[2]
RATIO = 0.2
REST = "actor.entropy_rest"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    task.save_model(directory / "tied")
    task.save_model(directory / "untied", tied=False)
    task.save_model(directory / "four_heads", heads=4)
    task.save_model(directory / "experts", config=ARCHITECTURES["qwen3_moe"])
    task.save_model(directory / "images", config=vision_config())
    save_adapter(directory / "untied", directory / "adapter")
    return directory


def save_adapter(model_path: Path, path: Path) -> None:
    """A LoRA adapter that trains the LM head too. verl's configuration has no key for that."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type=TaskType.CAUSAL_LM
    )
    get_peft_model(model, config).save_pretrained(path)


def run(ranks: int, models: Path, output: Path, *cases: str, **environment: str) -> Any:
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", optimizer_step.__file__),
            *(str(models), str(output), *cases),
        ],
        env=os.environ
        | {
            "VERL_USE_EXTERNAL_MODULES": "entropy_rl.integrations.verl.cpu",
            "RAY_LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
        }
        | environment,
        check=True,
        timeout=600,
    )
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def results(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(request.param, models, tmp_path_factory.mktemp("output") / "results.pt")


@pytest.fixture(scope="module")
def ulysses_results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(4, models, tmp_path_factory.mktemp("output") / "results.pt", *ULYSSES)


def competitors(micro_batches: list[list[list[int]]], case: dict[str, Any]) -> list[list[int]]:
    """The rows whose tokens compete with each other, from the micro-batches of each rank."""
    if case.get("actor.entropy_top_scope") == "sequence":
        return [[index] for of_rank in micro_batches for rows in of_rank for index in rows]
    if case.get("actor.entropy_top_scope") == "mini_batch":
        micro_batches = [[[index for rows in of_rank for index in rows]] for of_rank in micro_batches]
    if case.get("actor.entropy_top_ranks") == "global":
        return [[index for rows in together for index in rows] for together in zip(*micro_batches, strict=True)]
    return [rows for of_rank in micro_batches for rows in of_rank]


@dataclass
class Row:
    """The policy's log-probabilities and entropies of a response, float64 [S], with their graph."""

    log_prob: Tensor
    entropy: Tensor


@dataclass
class Policy:
    model: Any
    rows: list[Row]


@pytest.fixture(scope="module")
def policies(models: Path) -> dict[str, Policy]:
    return {path.name: policy_of(path) for path in models.iterdir() if path.name != "adapter"}


def policy_of(model_path: Path) -> Policy:
    """Runs the model on one row at a time, without padding."""
    auto_class = AutoModelForImageTextToText if model_path.name == "images" else AutoModelForCausalLM
    model = auto_class.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    rows = []
    for index, row in enumerate(optimizer_step.rows()):
        prompt, image = row["prompt"], {}
        if model_path.name == "images":
            prompt, image = optimizer_step.with_image(index, prompt)
        tokens = torch.cat([prompt, row["response"]])[None]
        if image:
            image["mm_token_type_ids"] = (tokens == IMAGE).int()  # the model finds the places of the image by these
        log_p = (model(tokens, **image).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        rows.append(
            Row(log_p.gather(-1, row["response"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)),
        )
    return Policy(model, rows)


def chosen_by_covariance(rows: dict[int, tuple[Tensor, ...]], case: dict[str, Any]) -> dict[int, Tensor]:
    """The tokens that clip_cov or kl_cov chooses, by row, from log-probs, old log-probs, advantages and masks.

    The draw of clip_cov is the package's own; tests/ops tests it.
    """
    batch = [torch.cat(values) for values in zip(*(rows[index] for index in sorted(rows)), strict=True)]
    log_prob, _, advantage, mask = batch
    if case["actor.policy_loss.loss_mode"] == "clip_cov":
        torch.manual_seed(optimizer_step.SEED)
        numbers = {key.removeprefix("actor.policy_loss."): value for key, value in case.items() if "clip_cov_" in key}
        chosen = covariance_mask(*batch, "clip_cov", seed=int(torch.randint(2**62, ())), **numbers)
        assert 0 < chosen.sum() == int(0.1 * mask.sum())
    else:
        covariance = (advantage - advantage[mask].mean()) * (log_prob - log_prob[mask].mean())
        lowest = covariance[mask].topk(max(1, int(case["actor.policy_loss.kl_cov_ratio"] * mask.sum()))).values[-1]
        chosen = mask & (covariance >= lowest)
    return dict(zip(sorted(rows), chosen.split([len(rows[index][0]) for index in sorted(rows)]), strict=True))


def by_choice(chosen: Tensor, own: float, rest: float) -> Tensor:
    return torch.where(chosen, *torch.tensor([own, rest], dtype=torch.float64))


def token_losses(
    mode: str,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    by_covariance: Tensor | None,
    chosen: Tensor,
    case: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token, and the values whose means are the metrics, with verl's default constants. Only vanilla
    has the clip ranges of a case."""
    d = log_prob - old_log_prob
    ratio, p, q = d.exp(), log_prob.exp(), old_log_prob.exp()
    none = torch.zeros_like(d)
    moved = {"actor/ppo_kl": -d}
    match mode:
        case "gpg":
            return -log_prob * advantage, {}
        case "clip_cov":
            loss = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
            return torch.where(by_covariance, 0.0, loss), moved | {"actor/pg_clipfrac": by_covariance.double()}
        case "kl_cov":
            return -ratio * advantage + 0.1 * d.abs() * by_covariance, {"actor/ppo_kl": d.abs()}
        case "dro":
            return -(log_prob * advantage - 0.1 / 2 * d**2), moved
        case "cispo":
            bounded = ratio.clamp(0.8, 1.2)
            clipped, lower = ratio != bounded, none
            loss = -bounded.detach() * advantage * log_prob
        case "sapo":
            tau = torch.where(advantage > 0, 1.0, 1.05)
            clipped = lower = none
            loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
        case "dppo_tv" | "dppo_kl":
            if mode == "dppo_tv":
                inside = torch.where(advantage > 0, p - q <= 0.2, p - q >= -0.2)
            else:
                divergence = q * -d + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
                inside = (divergence <= 0.2) | torch.where(advantage > 0, p <= q, p >= q)
            clipped, lower = ~inside, inside & (ratio > 3)
            loss = torch.where(inside, -advantage * ratio.clamp(max=3).detach() * log_prob, 0.0)
        case _:
            own = [case.get(f"actor.clip_ratio_{end}", 0.2) for end in ("low", "high")]
            rest = [case.get(f"{REST}.clip_ratio_{end}", own[i]) for i, end in enumerate(("low", "high"))]
            below, above = (by_choice(chosen, *pair) for pair in zip(own, rest, strict=True))
            clamped = torch.minimum(torch.maximum(ratio, 1 - below), 1 + above)
            unclipped, bounded = -ratio * advantage, -clamped * advantage
            loss = torch.maximum(unclipped, bounded)
            clipped, lower = bounded > unclipped, (advantage < 0) & (loss > -3 * advantage)
            loss = torch.where(lower, -3 * advantage, loss)
    return loss, moved | {"actor/pg_clipfrac": clipped.double(), "actor/pg_clipfrac_lower": lower.double()}


@dataclass
class Selection:
    """The selection from rows whose tokens compete with each other."""

    masks: dict[int, Tensor]  # by row: the rule selected the token
    weights: dict[int, Tensor]  # by row, float64
    vetoed: int
    by_covariance: dict[int, Tensor]
    selected_tokens: int
    response_tokens: int
    threshold: float


def scores(policy: Policy, case: dict[str, Any]) -> list[Tensor]:
    """What ranks the tokens of each row."""
    rows, old_policy = optimizer_step.rows(), case.get("actor.entropy_top_source") == "old_policy"
    entropy = [
        row["old_entropy"].double() if old_policy else known.entropy.detach()
        for row, known in zip(rows, policy.rows, strict=True)
    ]
    match case.get("actor.entropy_top_score", "entropy").rpartition(":")[-1]:
        case "surprisal":
            return [-known.log_prob.detach() for known in policy.rows]
        case "random":  # the draw is the package's own; tests/python tests it
            torch.manual_seed(optimizer_step.SEED)
            mask = torch.cat([row["mask"] for row in rows])
            drawn = random_scores(torch.randint(2**62, ()), mask, torch.tensor(0))
            return list(drawn.split([len(row["mask"]) for row in rows]))
        case "entropy_times_advantage":
            return [values * row["advantage"].double().abs() for values, row in zip(entropy, rows, strict=True)]
        case _:
            return entropy


def select(policy: Policy, indices: list[int], case: dict[str, Any]) -> Selection:
    rows = {index: row for index, row in enumerate(optimizer_step.rows()) if index in indices}
    old_policy = case.get("actor.entropy_top_source") == "old_policy"
    score = scores(policy, case)
    mask = torch.cat([rows[index]["mask"] for index in indices])
    n, ratio = int(mask.sum()), case.get("actor.entropy_top_ratio", RATIO)
    k = max(1, min(n, int(n * ratio + 0.9999)))
    competing = torch.cat([score[index] for index in indices])[mask]
    threshold = competing.sort(descending=True).values[k - 1]
    if case.get("actor.entropy_top_rule") == "quantile":
        kept = competing >= competing.quantile(1 - RATIO)
        k, threshold = int(kept.sum()), competing[kept].min()
    by_covariance: dict[int, Tensor] = {}
    if case.get("actor.policy_loss.loss_mode") in optimizer_step.COVARIANCE_MODES:
        known = {
            index: row["old_log_prob"] if old_policy else policy.rows[index].log_prob.detach()
            for index, row in rows.items()
        }
        by_covariance = chosen_by_covariance(
            {
                index: (known[index].double(), row["old_log_prob"].double(), row["advantage"].double(), row["mask"])
                for index, row in rows.items()
            },
            case,
        )
    masks = {index: row["mask"] & (score[index] >= threshold) for index, row in rows.items()}
    weights, vetoed = {}, 0
    for index, row in rows.items():
        entropy = row["old_entropy"].double() if old_policy else policy.rows[index].entropy.detach()
        rest = case.get("actor.entropy_rest.weight", 0.0)
        weights[index] = torch.where(masks[index], 1.0, rest).double() * row["mask"]
        if "actor.token_weight" in case:
            weights[index] = weights[index] * entropy * (entropy > 3.701)
        if "actor.entropy_veto.entropy" in case:
            spurious = row["mask"] & (row["advantage"] > 0) & (entropy < case["actor.entropy_veto.entropy"])
            spurious &= policy.rows[index].log_prob.detach().exp() < case["actor.entropy_veto.probability"]
            weights[index][spurious] = 0.0
            vetoed += int(spurious.sum())
    return Selection(masks, weights, vetoed, by_covariance, k, n, threshold.item())


def statement(policy: Policy, micro_batches: list[list[list[int]]], case: dict[str, Any]) -> dict[str, Any]:
    """The step in float64, without code of verl or, except for clip_cov's draw, of this package."""
    rows = optimizer_step.rows()
    losses, bonus, kl, weighted_kl = [], [], [], []
    means: dict[str, list[Tensor]] = defaultdict(list)
    mode = case.get("actor.policy_loss.loss_mode", "vanilla")
    only_selected = (
        case.get("model.use_fused_kernels") and "actor.entropy_top_scope" in case and "actor.entropy_coeff" not in case
    )
    suffix = "_selected" if only_selected and case.get("actor.entropy_top_source") == "old_policy" else ""
    selections = [select(policy, indices, case) for indices in competitors(micro_batches, case)]
    for selection in selections:
        for index, weight in selection.weights.items():
            row, log_prob, trains = rows[index], policy.rows[index].log_prob, weight > 0
            old_log_prob, advantage = row["old_log_prob"].double(), row["advantage"].double()
            by_covariance = selection.by_covariance.get(index)
            chosen = selection.masks[index]
            token_loss, metrics = token_losses(mode, log_prob, old_log_prob, advantage, by_covariance, chosen, case)
            for name, values in metrics.items():
                # clip_cov's choice is known for all tokens.
                of_selected = suffix and (mode, name) != ("clip_cov", "actor/pg_clipfrac")
                name, counted = (name + suffix, trains) if of_selected else (name, row["mask"])
                means[name].append(values.detach()[counted])
            if case.get("weights"):
                token_loss = token_loss * row["weight"]
            loss = (token_loss * weight)[trains].sum()
            losses.append(loss / weight.sum() if mode == "sapo" and trains.any() else loss)
            bonus.append(policy.rows[index].entropy[row["mask"]].sum())
            token_kl = torch.where(row["mask"], (log_prob - row["ref_log_prob"]) ** 2 / 2, 0.0)
            coef = case.get("actor.kl_loss_coef", 0.0)
            kl.append(token_kl.sum())
            weighted_kl.append((token_kl * by_choice(chosen, coef, case.get(f"{REST}.kl_loss_coef", coef))).sum())

    selected_tokens = sum(selection.selected_tokens for selection in selections)
    total_weight = sum(weight.sum().item() for selection in selections for weight in selection.weights.values())
    if "actor.entropy_veto.entropy" in case and "actor.entropy_top_scope" not in case:
        # Each micro-batch takes the mean over its own weights, weighted by what topk selects.
        begins = [0, *itertools.accumulate(len(selection.weights) for selection in selections)]
        losses = [
            loss * (selection.selected_tokens / sum(weight.sum() for weight in selection.weights.values()))
            for selection, begin in zip(selections, begins, strict=False)
            for loss in losses[begin : begin + len(selection.weights)]
        ]
        total_weight = selected_tokens
    response_tokens = sum(selection.response_tokens for selection in selections)
    thresholds = sum(selection.threshold * selection.response_tokens for selection in selections)
    divisor, divisor_of_all = total_weight, response_tokens
    if case.get("actor.entropy_top_normalize") == "response":
        divisor = response_tokens
    if case.get("actor.loss_agg_mode") == "seq-mean-token-sum":
        divisor = divisor_of_all = optimizer_step.ROWS
    if mode == "sapo":
        divisor = optimizer_step.ROWS
    policy_loss = torch.stack(losses).sum() / divisor
    threshold = "score" if "actor.entropy_top_score" in case else "entropy"
    entropy, penalty = torch.stack(bonus).sum() / divisor_of_all, torch.stack(kl).sum() / divisor_of_all
    loss = policy_loss - case.get("actor.entropy_coeff", 0) * entropy
    if case.get("actor.use_kl_loss"):
        loss = loss + torch.stack(weighted_kl).sum() / divisor_of_all
    parameters = dict(policy.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    metrics = {
        "actor/pg_loss": policy_loss.item(),
        "actor/entropy_token_ratio": selected_tokens / response_tokens,
        f"actor/{threshold}_threshold": thresholds / response_tokens,
    }
    shares = [
        int(chosen.sum()) / int(rows[index]["mask"].sum())
        for selection in selections
        for index, chosen in selection.masks.items()
    ]
    metrics |= {f"actor/entropy_token_ratio/{end.__name__}": end(shares) for end in (min, max)}
    if "actor.entropy_veto.entropy" in case:
        metrics["actor/entropy_veto_ratio"] = sum(selection.vetoed for selection in selections) / response_tokens
        assert metrics["actor/entropy_veto_ratio"] > 0
    metrics |= {name: torch.cat(values).mean().item() for name, values in means.items()}
    if not only_selected:
        metrics["actor/entropy_loss"] = entropy.item()
    if case.get("actor.use_kl_loss"):
        metrics["kl_loss"] = penalty.item()
    trained = sum(int((weight > 0).sum()) for selection in selections for weight in selection.weights.values())
    return {
        "gradients": dict(zip(parameters, gradients, strict=True)),
        "metrics": metrics,
        "head_rows": trained if only_selected else response_tokens,
    }


def each_count(cases: dict[str, tuple[dict[str, Any], tuple[int, ...]]]) -> list[Any]:
    return [pytest.param(name, n, id=f"{name}-{n or 'dynamic'}") for name, (_, counts) in cases.items() for n in counts]


@pytest.mark.parametrize("name, count", each_count(CASES))
def test_gradients_and_metrics(results: Any, policies: dict[str, Policy], name: str, count: int) -> None:
    check(results[name][count], policies, CASES[name][0], count)


@pytest.mark.parametrize("name, count", each_count(ULYSSES))
def test_sequence_parallel(ulysses_results: Any, policies: dict[str, Policy], name: str, count: int) -> None:
    case, result = ULYSSES[name][0], ulysses_results[name][count]
    size = case["actor.ulysses_sequence_parallel_size"]
    assert len(result["micro_batches"]) == 4 // size
    check(result, policies, case, count)
    # Each rank of a sequence has rows of its own, and no rank has all of them.
    head_rows = torch.tensor(result["head_rows"]).unflatten(0, (-1, size))
    assert "fused" not in name or (head_rows < head_rows.sum(1, keepdim=True)).all()


def check(result: Any, policies: dict[str, Policy], case: dict[str, Any], count: int) -> None:
    micro_batches = result["micro_batches"]
    assert sorted(index for rank in micro_batches for rows in rank for index in rows) == list(
        range(optimizer_step.ROWS)
    )
    assert all(len(rank) == count if count else len(rank) > 1 for rank in micro_batches)

    expected = statement(policies[optimizer_step.directory(case)], micro_batches, case)
    gradients, wanted = result["gradients"], expected["gradients"]
    assert gradients.keys() == wanted.keys()
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert norm > 0.01
    for parameter, gradient in wanted.items():
        difference = (gradients[parameter].double() - gradient).norm()
        assert difference <= 1e-6 * norm, f"{parameter}: {difference / norm:.1e}"
    # kl_cov's token losses have magnitude 1 and nearly cancel, so their float32 mean has an absolute error.
    cancels = case.get("actor.policy_loss.loss_mode") == "kl_cov"
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-6, abs=5e-8 if cancels else 0)
    check_outputs(result, policies[optimizer_step.directory(case)])
    if case.get("model.use_fused_kernels"):
        assert sum(map(sum, result["head_rows"])) == expected["head_rows"]


def check_outputs(result: Any, policy: Policy) -> None:
    """Log-probs and entropies of padding-free batches, position by position: on every rank those of all its rows."""
    ranks = len(result["outputs"]) // len(result["micro_batches"])  # of one sequence
    for rank, outputs in enumerate(result["outputs"]):
        if outputs is None:
            continue
        assert sorted(outputs) == sorted(index for rows in result["micro_batches"][rank // ranks] for index in rows)
        for index, values in outputs.items():
            mask, known = optimizer_step.rows()[index]["mask"], policy.rows[index]
            for got, wanted in zip(values, (known.log_prob, known.entropy), strict=True):
                torch.testing.assert_close(got[mask].double(), wanted.detach()[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [2, "second"], ids=["first step", "second step"])
@pytest.mark.parametrize("name", [name for name in LORA if not name.endswith("verl")])
def test_lora_on_all_tokens_equals_verls(results: Any, name: str, step: Any) -> None:
    base = name.removesuffix("-fused")
    ours, verls = results[name][step], results[f"{base}-verl"][step]
    assert ours["gradients"].keys() == verls["gradients"].keys()
    adapters = [parameter for parameter in verls["gradients"] if "lora_" in parameter]
    head = [parameter for parameter in verls["gradients"] if "modules_to_save" in parameter]
    assert adapters and len(head) == name.startswith("lora-head")
    assert len(adapters) + len(head) == len(verls["gradients"])  # all else is frozen
    norm = torch.cat([gradient.flatten() for gradient in verls["gradients"].values()]).norm()
    assert norm > 0.01
    for parameter, gradient in verls["gradients"].items():
        difference = (ours["gradients"][parameter] - gradient).norm()
        assert difference <= 1e-5 * norm, f"{parameter}: {difference / norm:.1e}"
    assert (
        step != "second" or verls["metrics"]["actor/pg_loss"] != results[f"{base}-verl"][2]["metrics"]["actor/pg_loss"]
    )
    assert ours["metrics"]["actor/pg_loss"] == pytest.approx(verls["metrics"]["actor/pg_loss"], rel=1e-5)


def test_null_is_bit_identical_to_verl_without_the_plugin(models: Path, tmp_path: Path) -> None:
    ours = run(1, models, tmp_path / "ours.pt", "null")["null"][2]
    verls = run(1, models, tmp_path / "verls.pt", "stock", VERL_USE_EXTERNAL_PLUGINS="none")["stock"][2]
    assert ours["metrics"] == verls["metrics"]
    assert "actor/pg_loss" in ours["metrics"] and "actor/entropy_token_ratio" not in ours["metrics"]
    assert ours["gradients"].keys() == verls["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        assert torch.equal(gradient, verls["gradients"][name]), name
