"""An optimizer step of verl's Megatron engine under tensor parallelism equals one with an unsharded, plain LM head."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_step
import pytest
import torch
from megatron_step import CASES, PADDED, VOCAB

TESTS = Path(__file__).parents[2]
OURS = [name for name, (_, head, *_) in CASES.items() if head == "ours"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("output") / "results.pt"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", megatron_step.__file__, str(output)),
        ],
        env=os.environ
        | {
            # Where `make test-verl` puts Megatron Core.
            "PYTHONPATH": os.pathsep.join((f"{sys.prefix}/megatron", str(TESTS), os.environ.get("PYTHONPATH", ""))),
            "VERL_USE_EXTERNAL_MODULES": "entropy_rl.integrations.verl.cpu",
            "OMP_NUM_THREADS": "1",
        },
        check=True,
        timeout=600,
    )
    return torch.load(output, weights_only=False)


@pytest.mark.parametrize("name", OURS)
def test_gradients_and_metrics(results: Any, name: str) -> None:
    """In float64. The vocabulary's padding holds NaN or large numbers, and gets no gradient."""
    result, expected = results[name], results["-".join(name.split("-")[:2]) + "-1-plain"]
    norm = torch.cat([gradient[:VOCAB].flatten() for gradient in expected["gradients"].values()]).norm()
    assert norm > 0.01
    assert result["gradients"].keys() == expected["gradients"].keys()
    for parameter, gradient in expected["gradients"].items():
        difference = (result["gradients"][parameter] - gradient).norm()
        assert difference <= 1e-12 * norm, f"{parameter}: {difference / norm:.1e}"
        if len(gradient) == PADDED and not parameter.startswith("decoder"):
            assert (result["gradients"][parameter][VOCAB:] == 0).all()
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_only_rows_that_the_loss_reads_meet_the_head(results: Any, name: str) -> None:
    size = CASES[name][0]
    tokens = torch.cat([row["mask"] for row in megatron_step.optimizer_step.rows()])
    of_first_replica = sum(results[name]["head_rows"])
    assert len(results[name]["head_rows"]) == 2  # micro-batches
    if size == 4:  # the first replica is the only one
        n = int(tokens.sum())
        assert of_first_replica == (n if name.startswith("bonus") else max(1, int(n * 0.2 + 0.9999)))
    else:
        assert 0 < of_first_replica < len(tokens)
