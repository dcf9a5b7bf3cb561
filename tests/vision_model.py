"""The configuration of a tiny vision-language model, for `save_model_of` in tiny_model.py."""

from transformers import Qwen2VLConfig

from tiny_model import SHARED, WORDS

VISION_START, VISION_END, IMAGE, VIDEO = range(len(WORDS), len(WORDS) + 4)  # tokens after those of the tiny tokenizer
PATCH, MERGE, FRAMES = 4, 2, 2  # pixels, patches of a token in each direction, frames of an image


def vision_config() -> Qwen2VLConfig:
    """Of a Qwen2-VL."""
    return Qwen2VLConfig(
        text_config=SHARED
        | {
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
