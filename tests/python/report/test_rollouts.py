"""The files of rollouts, read and written, and the page that is made from them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_page import column, read_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_rl import cli
from entropy_rl.errors import UserError
from entropy_rl.report.rollouts import Rollout, make_rollouts, read_rollouts, write_rollouts

PROMPT = "<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"


def rollout(step: int, score: float, tokens: list[str]) -> Rollout:
    n = len(tokens)
    values = torch.rand(2, n, generator=torch.Generator().manual_seed(step))
    return Rollout(
        input=PROMPT,
        output="".join(tokens),
        score=score,
        step=step,
        tokens=tokens,
        token_ids=list(range(n)),
        entropies=values[0].tolist(),
        log_probs=(-values[1]).tolist(),
        selected=[1] + [0] * (n - 1),
        advantage=score - 0.5,
        data_source="sums",
        uid=f"{step}-0",
    )


def make_steps(directory: Path) -> list[Rollout]:
    rollouts = [rollout(1, 0.0, [" 3", "\n"]), rollout(2, 1.0, [" 2"]), rollout(10, 1.0, [" two", "⟨e6 98⟩", "⟨a5⟩"])]
    for each in rollouts:
        write_rollouts(directory / f"{each.step}.jsonl", [each])
    return rollouts


def test_rollouts_of_a_batch() -> None:
    """Only the tokens of the response; a padded row, and a token that is a part of a character."""
    alphabet = {word: i for i, word in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)
    first, second = [*fast.encode("春"), 0], fast.encode("ab")
    responses = torch.tensor([first, [*second, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    values = torch.arange(8.0).view(2, 4)
    found = make_rollouts(
        fast,
        [fast.encode("1+1"), fast.encode("2+2")],
        responses,
        mask,
        step=3,
        scores=torch.tensor([0.0, 1.0]),
        advantages=-values,
        entropies=values,
        log_probs=values - 9,
        selected=values > 4,
        data_sources=["sums", "more"],
    )
    shown = ["⟨e6⟩", "⟨98⟩", "⟨a5⟩", "<eos>"]
    assert found == [
        Rollout("1+1", "春", 0.0, 3, shown, first, [0, 1, 2, 3], [-9, -8, -7, -6], [0] * 4, -1.5, "sums"),
        Rollout("2+2", "ab", 1.0, 3, ["a", "b"], second, [4, 5], [-5, -4], [0, 1], -4.5, "more"),
    ]
    bare = make_rollouts(fast, [[1], [2]], responses, mask, step=3, scores=torch.zeros(2))
    assert bare[1] == Rollout(fast.decode([2]), "ab", 0.0, 3, ["a", "b"], second)


def float32(values: list[float] | None) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def test_a_round_trip(tmp_path: Path) -> None:
    """In the order of the steps, 10 after 2; float32 values keep every bit; absent values stay absent."""
    rollouts = make_steps(tmp_path)
    bare = Rollout("春", "x", None, 11, ["x"])
    write_rollouts(tmp_path / "11.jsonl", [bare])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "10.jsonl", "11.jsonl", "2.jsonl"]
    found = read_rollouts(tmp_path)
    assert found[-1] == bare and "null" not in (tmp_path / "11.jsonl").read_text()
    for before, after in zip(rollouts, found[:-1], strict=True):
        assert float32(after.entropies) == float32(before.entropies)
        assert float32(after.log_probs) == float32(before.log_probs)
        same = {"entropies": None, "log_probs": None}
        assert replace(after, **same) == replace(before, **same)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    one = replace(rollout(1, math.nan, ["a", "b"]), entropies=[math.nan, 1.0], log_probs=[-math.inf, -1.0])
    write_rollouts(tmp_path / "1.jsonl", [one])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "1.jsonl").read_text(), parse_constant=refuse)
    (found,) = read_rollouts(tmp_path)
    assert found.score is None and found.entropies is not None and math.isnan(found.entropies[0])


def test_verls_own_files(tmp_path: Path) -> None:
    """They have neither tokens nor entropies; the words of the output take their place."""
    row = {
        "input": "user\n1 + 1 =\nassistant\n",
        "output": " It is\n2. ",
        "gts": "2",
        "score": 1.0,
        "step": 3,
        "acc": 1,
    }
    (tmp_path / "3.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_rollouts(tmp_path)
    assert found.tokens == [" It", " is", "\n2.", " "] and found.entropies is None and found.score == 1.0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"output": None}, "output must be a text"),
        ({"score": "good"}, "score must be a finite number"),
        ({"step": 1.5}, "step must be an integer"),
        ({"entropies": [1.0]}, "entropies has 1 entries and tokens has 2"),
        ({"entropies": "high"}, "entropies must be a list of numbers"),
        ({"selected": [0, 2]}, "selected must be a list of 0 and 1"),
        ({"tokens": [1, 2]}, "tokens must be a list of texts"),
        ({"tokens": None}, "there is no 'tokens'"),
    ],
)
def test_mistakes_in_a_file(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "1.jsonl", [rollout(1, 0.0, [" 3", "\n"])])
    good = json.loads((tmp_path / "1.jsonl").read_text())
    (tmp_path / "1.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | row) + "\n")
    with pytest.raises(UserError, match=f"1.jsonl: line 2: {expected}"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "it has no file like 1.jsonl"),
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is a JSON list"),
        ("", "no resp"),
    ],
)
def test_files_that_are_something_else(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "1.jsonl").write_text(content)
    with pytest.raises(UserError, match=expected):
        read_rollouts(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, output = tmp_path / "rollouts", tmp_path / "page.html"
    directory.mkdir()
    rollouts = make_steps(directory)
    assert cli.main(["inspect", "--rollouts", str(directory), "--output", str(output), "--title", "a run"]) == 0
    assert "6 tokens of 3 responses in 3 steps" in capsys.readouterr().out
    data = read_data(output.read_text())
    assert data["title"] == "a run" and data["questions"] == ["1 + 1 ="]
    assert [step["step"] for step in data["steps"]] == [1, 2, 10]
    for step, expected in zip(data["steps"], rollouts, strict=True):
        assert step["scores"] == [expected.score] and step["advantages"] == [expected.advantage]
        assert column(step["models"][0]["entropy"], "<f4").tolist() == expected.entropies
        assert column(step["selected"], "u1").tolist() == expected.selected
        assert [data["vocabulary"][i] for i in column(step["tokens"], "<i4")] == expected.tokens


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model is missing; give --model and --input, or --rollouts"),
        (["--model", "m"], "--input is missing"),
        (["--rollouts", "/nowhere"], "--rollouts /nowhere: there is no such directory"),
        (["--rollouts", "/tmp", "--model", "m"], "--model and --rollouts: give one of them"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "--output", str(tmp_path / "page.html"), *arguments]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", message) and expected in message
