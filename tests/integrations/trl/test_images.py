"""Two steps on a tiny vision-language model end as under TRL's own trainer, and do not depend on their split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOTrainer

from grpo import MINI_BATCH, TRLS_RULE, log_of, make_trainer
from tiny_model import WORDS, save_model_of
from vision_model import FRAMES, MERGE, PATCH, vision_config

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class Processor(Qwen2VLProcessor):
    """Without videos: transformers' processor of videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def processor() -> Processor:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *special])}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special,
        padding_side="left",  # as TRL pads the ids; it takes the places of images from the processor
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )
    return Processor(images, tokenizer, None, chat_template=TEMPLATE)


def problems() -> Dataset:
    """Images of four and of eight tokens."""
    generator = torch.Generator().manual_seed(0)

    def image(number: int) -> Image.Image:
        pixels = torch.randint(256, (16, 16 << number % 2, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy())

    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Count {number}."}], "image": image(number)} for number in range(16)]
    )


def share_of_digits(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


@pytest.fixture(scope="module")
def vision_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_of(vision_config(), tmp_path_factory.mktemp("vision"))


def steps(vision_path: Path, output: Path, *arguments: Any, **settings: Any) -> list[list[float]]:
    trainer = make_trainer(
        Qwen2VLForConditionalGeneration.from_pretrained(vision_path, dtype=torch.float32),
        output,
        *arguments,
        others={
            "reward_funcs": share_of_digits,
            "train_dataset": problems(),
            "processing_class": processor(),
        },
        max_steps=2,
        **settings,
    )
    seen = []
    trainer.model.model.visual.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    trainer.train()
    assert any(seen)
    return log_of(trainer)


def test_two_steps_with_images_are_trls(vision_path: Path, tmp_path: Path) -> None:
    theirs = steps(vision_path, tmp_path, GRPOTrainer, top_entropy_quantile=0.2)
    assert len(theirs) == 2 and all(norm > 0.01 for _, norm, _ in theirs)
    for head in ("selected_rows", "trl"):
        for scope in ("micro_batch", "mini_batch"):  # the same tokens: a step is one micro-batch
            ours = steps(vision_path, tmp_path, **TRLS_RULE, entropy_lm_head=head, entropy_top_scope=scope)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine == pytest.approx(other, rel=1e-5)


def test_a_step_with_images_does_not_depend_on_its_split(vision_path: Path, tmp_path: Path) -> None:
    """Each micro-batch gets its own images, in the forward before the step too."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, two = (
        steps(vision_path, tmp_path, entropy_top_ratio=0.2, **MINI_BATCH, **settings) for settings in ({}, split)
    )
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
