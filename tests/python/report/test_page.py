"""The page as a file: its data, and that no token can be read as markup."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from entropy_rl.report.completions import Completion
from entropy_rl.report.measure import Measurement
from entropy_rl.report.page import LOG_PROB_STEP, MeasuredModel, last_user_message, write_page
from entropy_rl.report.tokens import token_text


def byte_level() -> PreTrainedTokenizerBase:
    """Byte-level BPE with few merges: for a word, and for the mark that begins the end of a script element."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "</", "Ġt", "Ġthe"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate([*words, "he"])}, [("<", "/"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def sentence_piece() -> PreTrainedTokenizerBase:
    words = ["<unk>", "▁the", "▁", "a", "<0xE4>", "<0x0A>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def word_level() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel({"36": 0, "+": 1}, unk_token="+"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("tokenizer", "token", "text"),
    [
        (byte_level(), "Ġthe", " the"),
        (byte_level(), "Ċ", "\n"),
        (byte_level(), "ä", "⟨e4⟩"),  # the first byte of three
        (sentence_piece(), "▁the", " the"),
        (sentence_piece(), "a", "a"),
        (sentence_piece(), "<0x0A>", "\n"),
        (sentence_piece(), "<0xE4>", "⟨e4⟩"),
        (word_level(), "36", " 36"),
    ],
)
def test_text_of_a_token(tokenizer: PreTrainedTokenizerBase, token: str, text: str) -> None:
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids(token)) == text


def read_data(page: str) -> Any:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found)


def column(text: str, dtype: str) -> numpy.ndarray:
    return numpy.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def test_data(tmp_path: Path) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(" the</a>")
    completions = [Completion(tokenizer.encode("</script>"), ids), Completion(tokenizer.encode("</script>"), ids[:2])]
    n = len(ids) + 2
    entropy = torch.rand(n)
    log_prob = -torch.rand(n) * 12
    log_prob[0], log_prob[1] = -torch.inf, -50.0
    top = torch.arange(2 * n).reshape(n, 2) % 11
    model = MeasuredModel("a model", Measurement(entropy, log_prob, top, log_prob[:, None].expand(n, 2)))
    write_page(tmp_path / "page.html", [model], completions, tokenizer, ratio=0.3, temperature=0.7)

    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 2, "a token ended a script element"
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|@import|url\((?!#)|https?://", page), (
        "the page names another place"
    )
    data = read_data(page)
    (step,) = data["steps"]
    assert step["lengths"] == [len(ids), 2] and step["promptOf"] == [0, 0] and data["prompts"] == ["</script>"]
    assert (data["ratio"], data["temperature"], data["sampledAt"]) == (0.3, 0.7, None)
    assert "".join(data["vocabulary"][i] for i in column(step["tokens"], "<i4")) == " the</a> the</"
    (found,) = step["models"]
    assert column(found["entropy"], "<f4").tolist() == entropy.tolist(), "entropies keep every bit"
    steps = column(found["logProb"], "<u2")
    assert steps[:2].tolist() == [65535, 65535]
    assert abs(steps[2:] * -LOG_PROB_STEP - log_prob[2:].numpy()).max() <= LOG_PROB_STEP / 2 + 1e-6
    words = [data["vocabulary"][i] for i in column(found["topTokens"], "<i4")]
    assert words == [token_text(tokenizer, token) for token in top.flatten().tolist()]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nOther?<|im_end|>\n<|im_start|>assistant\nYes."
        "<|im_end|>\n"
        "<|im_start|>user\nWhy\nnot?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy\nnot?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>",
        "<bos><start_of_turn>user\nWhy\nnot?<end_of_turn>\n<start_of_turn>model\n",
        "<|system|>\nYou help.<|end|>\n<|user|>\nWhy\nnot?<|end|>\n<|assistant|>\n",
        "<|start|>system<|message|>You help.<|end|><|start|>user<|message|>Why\nnot?<|end|><|start|>assistant",
        "<\uff5cUser\uff5c>Why\nnot?<\uff5cAssistant\uff5c>",
        "<s>[INST] Why\nnot? [/INST]",
        "system\nYou help.\nuser\nWhy\nnot?\nassistant\n",
        "system\n\nYou help.\nuser\n\nWhy\nnot?assistant\n\n",
        "Why\nnot?",
    ],
)
def test_the_last_user_message(prompt: str) -> None:
    assert last_user_message(prompt) == "Why\nnot?"
