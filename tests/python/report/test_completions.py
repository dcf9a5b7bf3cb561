"""Reading a file of completions, and sampling completions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from entropy_rl.errors import UserError
from entropy_rl.pretrained import end_of_text_ids
from entropy_rl.report.completions import has_completions, read_completions, read_prompts, sample_completions

USER = [{"role": "user", "content": "1 + 1 ="}]
ANSWER = [{"role": "assistant", "content": "2"}]


@pytest.fixture
def tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[tuple[str, str]]:
    completions = read_completions(path, tokenizer, "prompt", "completion", limit)
    return [(tokenizer.decode(c.prompt), tokenizer.decode(c.tokens)) for c in completions]


def test_both_kinds_of_file_give_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_parquet: Callable[..., Path]
) -> None:
    rows = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    expected = [("1 + 1 =", " 2"), ("2 + 2 =", " 4")]
    assert read(write_lines(tmp_path / "a.jsonl", *rows), tokenizer) == expected
    assert read(write_parquet(tmp_path / "a.parquet", rows), tokenizer) == expected
    assert read(tmp_path / "a.jsonl", tokenizer, limit=1) == expected[:1]


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = write_lines(tmp_path / "a.jsonl", {"prompt": USER, "completion": ANSWER})
    assert read(path, tokenizer) == [("<user>1 + 1 =;<assistant>", "2;")]


def test_a_beginning_of_text_token_comes_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = "~"
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "12"}, {"prompt": "~12"})
    assert [tokenizer.decode(p) for p in read_prompts(path, tokenizer, "prompt", None)] == ["12", "~12"]
    # A tokenizer that puts the token first, as those of Llama models do.
    begins = tokenizer.convert_tokens_to_ids("~")
    encode = tokenizer.encode
    tokenizer.encode = lambda text, add_special_tokens=True: [begins] * add_special_tokens + encode(text)  # type: ignore[method-assign]
    assert [tokenizer.decode(p) for p in read_prompts(path, tokenizer, "prompt", None)] == ["~12", "~12"]


def test_whether_a_file_holds_completions(tmp_path: Path) -> None:
    answered, bare = {"prompt": "1", "completion": "2"}, {"prompt": "1"}
    for rows, expected in ([answered], True), ([bare], False), ([bare | {"completion": None}], False):
        assert has_completions(write_lines(tmp_path / "a.jsonl", *rows), "completion", None) is expected
    # Every row that is used must agree; rows beyond the limit do not count.
    for rows, line, other in (([bare, answered], 1, 2), ([answered, {"completion": None}], 2, 1)):
        path = write_lines(tmp_path / "b.jsonl", *rows)
        with pytest.raises(UserError, match=f"line {line}: there is no 'completion', but line {other} has one"):
            has_completions(path, "completion", None)
        assert has_completions(path, "completion", 1) is (rows[0] is answered)


def test_several_end_of_text_tokens_end_a_sample_as_in_training(
    model_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The generation configuration names other ids than the tokenizer, whose id 1 ends a response too."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.generation_config.eos_token_id = [20, 30]
    assert end_of_text_ids(model, tokenizer) == [1, 20, 30]
    sampling = {"max_new_tokens": 60, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "batch_size": 32}
    completions = sample_completions(model, tokenizer, [[5, 6]], samples=64, **sampling)
    last = {completion.tokens[-1] for completion in completions if len(completion.tokens) < 60}
    assert last == {1, 20, 30}
    assert not any({1, 20, 30} & set(completion.tokens[:-1]) for completion in completions)


def test_a_sample_that_the_model_cannot_hold(model_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    sampling = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "batch_size": 32}
    with pytest.raises(UserError, match="prompt with --max-new-tokens: it has 513 tokens; the model has 512 positions"):
        sample_completions(model, tokenizer, [[5] * 3], max_new_tokens=510, **sampling)
    tokenizer.add_special_tokens({"pad_token": "<a pad token beyond the embedding>"})
    with pytest.raises(UserError, match="padding token: it has the id 97; the model's embedding has the ids 0 to 96"):
        sample_completions(model, tokenizer, [[5]], max_new_tokens=5, **sampling)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"completion": "2"}], "line 1: there is no 'prompt'; it has 'completion'"),
        ([{"prompt": "1", "completion": "2"}, {"prompt": "1"}], "line 2: there is no 'completion'; it has 'prompt'"),
        ([{"prompt": None, "completion": "2"}], "line 1: prompt must be a text or a list .* it is null"),
        ([{"prompt": "1", "completion": None}], "line 1: completion must be a text or a list .* it is null"),
        ([{"prompt": "1", "completion": ANSWER}], "completion is a list of messages and prompt is a text; give both"),
        ([{"prompt": "\ud800", "completion": "2"}], r"line 1: prompt holds the lone surrogate '\\ud800'; Unicode"),
        ([{"prompt": "1", "completion": "a\udfff"}], r"line 1: completion holds the lone surrogate '\\udfff'"),
        ([{"prompt": [{"role": "user", "content": "\ud800"}], "completion": "2"}], "prompt holds the lone surrogate"),
        ([{"prompt": "1", "completion": ""}], "line 1: completion is empty"),
        ([{"prompt": "", "completion": "2"}], "line 1: prompt has no tokens"),
        ([{"prompt": "1", "completion": 2}], "line 1: completion must be a text or a list of"),
        ([{"prompt": [], "completion": "2"}], "line 1: prompt must be a text or a list of"),
        ([{"prompt": [{"content": "1"}], "completion": "2"}], "line 1: prompt must be a text or a list of"),
        ([{"prompt": [{"role": "user", "content": None}], "completion": "2"}], "prompt must be a text or a list of"),
        ([[1, 2]], "line 1 is a JSON list; an object was expected"),
        ([], "the file has no rows"),
    ],
)
def test_mistakes_in_a_file(rows: list[Any], expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=expected):
        read(write_lines(tmp_path / "a.jsonl", *rows), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"prompt": \n', "line 1 is not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "line 1 is not JSON"),
        ("a.parquet", b"PAR1 not so", "not a Parquet file"),
        ("a.csv", b"prompt\n", "its name must end in .jsonl or .parquet"),
    ],
)
def test_files_that_are_something_else(
    name: str, content: bytes, expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read(tmp_path / name, tokenizer)


def test_a_file_that_does_not_exist(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match=r"this is a directory; a \.jsonl file was expected"):
        read(tmp_path / "b.jsonl", tokenizer)
