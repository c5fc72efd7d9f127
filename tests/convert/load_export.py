"""Print the logits of model folders, and what their tokenizers make of a text, under the transformers of this Python.

usage: load_export.py RESULT.pt FOLDER...
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "(1+2)*3=9,7<eos>"


def look(folder: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(TEXT).input_ids
    with torch.inference_mode():
        logits = model(torch.arange(2, 66)[None] % 20).logits[0]
    return {
        "logits": logits.float(),
        "dtype": str(model.dtype),
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "eos": tokenizer.eos_token_id,
    }


if __name__ == "__main__":
    result, *folders = sys.argv[1:]
    torch.save({"version": transformers.__version__} | {folder: look(folder) for folder in folders}, result)
