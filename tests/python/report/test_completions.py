"""What a file of completions may hold, and how it becomes tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from entropy_rl.errors import UserError
from entropy_rl.report.completions import has_completions, read_completions, read_prompts

USER = [{"role": "user", "content": "1 + 1 ="}]


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
    path = write_lines(tmp_path / "a.jsonl", {"prompt": USER, "completion": [{"role": "assistant", "content": "2"}]})
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
    assert has_completions(write_lines(tmp_path / "a.jsonl", {"prompt": "1", "completion": "2"}), "completion")
    assert not has_completions(write_lines(tmp_path / "b.jsonl", {"prompt": "1"}), "completion")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"completion": "2"}], "line 1: there is no 'prompt'; it has 'completion'"),
        ([{"prompt": "1", "completion": "2"}, {"prompt": "1"}], "line 2: there is no 'completion'; it has 'prompt'"),
        ([{"prompt": "1", "completion": ""}], "line 1: completion is empty"),
        ([{"prompt": "", "completion": "2"}], "a prompt has no tokens"),
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


def test_a_file_that_is_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "a.jsonl", tokenizer)
