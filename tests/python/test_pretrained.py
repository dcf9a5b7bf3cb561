"""Loading models and tokenizers, and the token ids that the trainer and `inspect` share."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from entropy_rl import cli, pretrained, train
from entropy_rl.config import load
from entropy_rl.errors import UserError
from entropy_rl.tasks import Problem
from training import as_arguments

QUESTION = [{"role": "user", "content": "12"}]


@pytest.fixture
def base_tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    """As those of base models: no chat template, and a post-processor that puts "~" before and "!" after a text."""
    tokenizer = AutoTokenizer.from_pretrained(model_path, bos_token="~")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A !", special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in "~!"]
    )
    return tokenizer


def test_a_base_models_prompt_begins_with_its_beginning_of_text_token(
    base_tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]
) -> None:
    """Once, in the trainer and in `inspect`; what the tokenizer puts after a text is not part of a prompt."""
    ids = {text: base_tokenizer.convert_tokens_to_ids(list(text)) for text in ("12", "~12")}
    assert base_tokenizer.encode("12") == [*ids["~12"], *base_tokenizer.convert_tokens_to_ids(["!"])]
    assert pretrained.prompt_ids(base_tokenizer, "12") == ids["~12"]
    assert pretrained.prompt_ids(base_tokenizer, "~12") == ids["~12"]
    assert pretrained.prompt_ids(base_tokenizer, QUESTION) == ids["~12"]
    ((_, encoded),) = train.encode(base_tokenizer, [Problem(QUESTION, "sums", "")], load(as_arguments(overrides)))
    assert encoded == ids["~12"]
    # A chat template writes the special tokens that it wants.
    base_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert pretrained.prompt_ids(base_tokenizer, QUESTION) == ids["12"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/nowhere/model", "there is no such directory"),
        ("./model", "there is no such directory"),
        ("nowhere/a/model", "there is no such directory"),
        ("nobody/no-model", "there is no such directory, and the hub does not give it: "),
    ],
)
def test_a_model_that_does_not_exist(path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load_it in (pretrained.load_tokenizer, pretrained.load_model, pretrained.check_model):
        with pytest.raises(UserError, match=f"^KEY={path}: no .* can be loaded from it: {expected}") as error:
            load_it(f"KEY={path}", path)
        assert "Repo id" not in str(error.value) and "\n" not in str(error.value)


def test_code_that_comes_with_a_model_runs_only_where_the_user_says_so(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a terminal, too, where transformers would ask and obey."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    path, marker = tmp_path / "model", tmp_path / "its code ran"
    shutil.copytree(model_path, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class Own(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = Own\n"
    )
    given = tmp_path / "given.jsonl"
    given.write_text('{"prompt": "1 + 1 =", "completion": "2"}\n')
    command = ["inspect", f"--model={path}", f"--input={given}", f"--output={tmp_path / 'page.html'}"]
    assert cli.main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "trust_remote_code" in message and not marker.exists()
    assert cli.main([*command, "--trust-remote-code"]) == 0
    assert marker.exists()


@pytest.mark.parametrize(
    ("rope", "length", "fits"),
    [
        (None, 64, True),
        (None, 65, False),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 256, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 257, False),
    ],
)
def test_the_longest_sequence_of_a_model(rope: dict[str, Any] | None, length: int, fits: bool) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    model = AutoModelForCausalLM.from_config(config)
    pretrained.check_fits(model, {"an id": [0, 49]}, "a sequence", 1)
    with pytest.raises(UserError, match="an id: it has the id 50; the model's embedding has the ids 0 to 49"):
        pretrained.check_fits(model, {"an id": [0, 50]}, "a sequence", 1)
    if fits:
        pretrained.check_fits(model, {}, "a sequence", length)
    else:
        with pytest.raises(UserError, match=f"a sequence: it has {length} tokens; the model has"):
            pretrained.check_fits(model, {}, "a sequence", length)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"data.max_response_length": 503}, "data.max_response_length=503", "it has 513 tokens; the model has 512 pos"),
        ({"pad": 97}, "its tokenizer's padding token", "it has the id 97; the model's embedding has the ids 0 to 96"),
        ({"vocabulary": 25}, "a token that its tokenizer gives", "the model's embedding has the ids 0 to 24"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_the_model_cannot_hold_stops_a_run_at_its_start(
    changes: dict[str, Any],
    key: str,
    expected: str,
    overrides: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prompts of at most 10 tokens, and a model with 512 positions and 97 ids."""
    path = tmp_path / "model"
    shutil.copytree(overrides["actor_rollout_ref.model.path"], path)
    changes = dict(changes)
    if pad := changes.pop("pad", None):
        tokenizer = AutoTokenizer.from_pretrained(path, pad_token="<a new token>")
        assert tokenizer.pad_token_id == pad
        tokenizer.save_pretrained(path)
    if rows := changes.pop("vocabulary", None):
        model = AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(rows)
        model.save_pretrained(path)
    overrides |= {"actor_rollout_ref.model.path": path}
    assert train.main(as_arguments(overrides | changes)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and key in message and expected in message
