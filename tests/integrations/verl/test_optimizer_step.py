"""Gradients of one optimizer step of verl's engine against a plain statement of masks and of Eq. 6's denominator."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optimizer_step
import pytest
import task
import torch
from optimizer_step import CASES, TEMPERATURE
from transformers import AutoModelForCausalLM

RATIO = 0.2


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task.save_model(tmp_path_factory.mktemp("model"))


def run(ranks: int, model_path: Path, output: Path, *cases: str, **environment: str) -> Any:
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", optimizer_step.__file__),
            *(str(model_path), str(output), *cases),
        ],
        env=os.environ
        | {
            "VERL_USE_EXTERNAL_MODULES": "entropy_rl.integrations.verl.cpu",
            "RAY_LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
        | environment,
        check=True,
        timeout=280,
    )
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def results(request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(request.param, model_path, tmp_path_factory.mktemp("output") / "results.pt")


def competitors(micro_batches: list[list[list[int]]], case: dict[str, Any]) -> list[list[int]]:
    """The rows whose tokens compete with each other, from the micro-batches of each rank."""
    if case.get("actor.entropy_top_scope") == "mini_batch":
        micro_batches = [[[index for rows in of_rank for index in rows]] for of_rank in micro_batches]
    if case.get("actor.entropy_top_ranks") == "global":
        return [[index for rows in together for index in rows] for together in zip(*micro_batches, strict=True)]
    return [rows for of_rank in micro_batches for rows in of_rank]


def statement(model_path: Path, micro_batches: list[list[list[int]]], case: dict[str, Any]) -> dict[str, Any]:
    """In float64, a row at a time, without padding, and without anything of this package or of verl."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager")
    rows = optimizer_step.rows()
    policy, bonus, kl, moved, clipped_tokens = [], [], [], [], []
    selected_tokens, response_tokens, thresholds = 0, 0, 0.0
    old_policy = case.get("actor.entropy_top_source") == "old_policy"
    preselected = old_policy and case.get("model.use_fused_kernels") and "actor.entropy_coeff" not in case
    for indices in competitors(micro_batches, case):
        log_prob, entropy, score = {}, {}, {}
        for index in indices:
            row = rows[index]
            tokens = torch.cat([row["prompt"], row["response"]])
            begin = len(row["prompt"]) - 1
            log_p = (model(tokens[None]).logits[0, begin:-1] / TEMPERATURE).log_softmax(-1)
            log_prob[index] = log_p.gather(-1, row["response"][:, None])[:, 0]
            entropy[index] = -(log_p.exp() * log_p).sum(-1)
            score[index] = row["old_entropy"].double() if old_policy else entropy[index].detach()
        mask = torch.cat([rows[index]["mask"] for index in indices])
        scores = torch.cat([score[index] for index in indices])
        n = int(mask.sum())
        k = max(1, int(n * RATIO + 0.9999))
        threshold = scores[mask].sort(descending=True).values[k - 1]
        selected_tokens, response_tokens = selected_tokens + k, response_tokens + n
        thresholds += threshold.item() * n

        for index in indices:
            row = rows[index]
            chosen = row["mask"] & (score[index] >= threshold)
            advantage = row["advantage"].double()
            if case.get("actor.policy_loss.loss_mode") == "gpg":
                token_loss = -log_prob[index] * advantage
            else:
                ratio = torch.exp(log_prob[index] - row["old_log_prob"])
                clipped = ratio.clamp(0.8, 1.2)
                seen = chosen if preselected else row["mask"]
                moved.append((row["old_log_prob"] - log_prob[index].detach())[seen])
                clipped_tokens.append((-clipped * advantage > -ratio * advantage).double()[seen])
                token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
                # Dual clip, for negative advantages.
                token_loss = torch.where(advantage < 0, torch.minimum(token_loss, -3 * advantage), token_loss)
            if case.get("weights"):
                token_loss = token_loss * row["weight"]
            policy.append(token_loss[chosen].sum())
            bonus.append(entropy[index][row["mask"]].sum())
            kl.append(((log_prob[index] - row["ref_log_prob"])[row["mask"]] ** 2 / 2).sum())
    divisor, whole_divisor = selected_tokens, response_tokens
    if case.get("actor.entropy_top_normalize") == "response":
        divisor = response_tokens
    if case.get("actor.loss_agg_mode") == "seq-mean-token-sum":
        divisor = whole_divisor = optimizer_step.ROWS
    loss = sum(policy) / divisor
    if "actor.entropy_coeff" in case:
        loss = loss - case["actor.entropy_coeff"] * sum(bonus) / whole_divisor
    if case.get("actor.use_kl_loss"):
        loss = loss + case["actor.kl_loss_coef"] * sum(kl) / whole_divisor
    loss.backward()
    result = {
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "actor/pg_loss": sum(policy).item() / divisor,
        "actor/entropy_token_ratio": selected_tokens / response_tokens,
        "actor/entropy_threshold": thresholds / response_tokens,
    }
    if moved:
        suffix = "_selected" if preselected else ""
        result[f"actor/ppo_kl{suffix}"] = torch.cat(moved).mean().item()
        result[f"actor/pg_clipfrac{suffix}"] = torch.cat(clipped_tokens).mean().item()
    if (
        not (case.get("model.use_fused_kernels") and case.get("actor.entropy_top_scope"))
        or "actor.entropy_coeff" in case
    ):
        result["actor/entropy_loss"] = sum(bonus).item() / whole_divisor
    return result


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_metrics(results: Any, model_path: Path, name: str) -> None:
    case, count = CASES[name]
    result = results[name]
    micro_batches = result["micro_batches"]
    assert sorted(index for rank in micro_batches for rows in rank for index in rows) == list(
        range(optimizer_step.ROWS)
    )
    assert all(len(rank) == count if count else len(rank) > 1 for rank in micro_batches)

    expected = statement(model_path, micro_batches, case)
    gradients, wanted = result["gradients"], expected.pop("gradients")
    assert gradients.keys() == wanted.keys()
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert norm > 0.01
    for parameter, gradient in wanted.items():
        difference = (gradients[parameter].double() - gradient).norm()
        assert difference <= 1e-6 * norm, f"{parameter}: {difference / norm:.1e}"
    for metric, value in expected.items():
        assert result["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric


def test_null_is_bit_identical_to_verl_without_the_plugin(model_path: Path, tmp_path: Path) -> None:
    ours = run(1, model_path, tmp_path / "ours.pt", "null")["null"]
    verls = run(1, model_path, tmp_path / "verls.pt", "stock", VERL_USE_EXTERNAL_PLUGINS="none")["stock"]
    assert ours["metrics"] == verls["metrics"]
    assert "actor/pg_loss" in ours["metrics"] and "actor/entropy_token_ratio" not in ours["metrics"]
    assert ours["gradients"].keys() == verls["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        assert torch.equal(gradient, verls["gradients"][name]), name
