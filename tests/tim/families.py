"""Text encoders of many families of transformers, tiny and with random weights, without a tokenizer beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
HEADS = {**SHAPE, "num_key_value_heads": 1}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SHAPE),
    "roberta": ("RobertaModel", "RobertaConfig", SHAPE),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", SHAPE),
    "deberta": ("DebertaV2Model", "DebertaV2Config", SHAPE),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**SHAPE, **ENDS}),
    "t5": ("T5EncoderModel", "T5Config", T5),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "clip": ("CLIPTextModel", "CLIPTextConfig", {**SHAPE, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma2": ("Gemma2Model", "Gemma2Config", {**HEADS, "head_dim": 16}),
    "gemma3": ("Gemma3TextModel", "Gemma3TextConfig", {**HEADS, "head_dim": 16}),
    "qwen2": ("Qwen2Model", "Qwen2Config", HEADS),
    "qwen3": ("Qwen3Model", "Qwen3Config", HEADS),
    "llama": ("LlamaModel", "LlamaConfig", SHAPE),
    "mistral": ("MistralModel", "MistralConfig", HEADS),
    "gpt2": ("GPT2Model", "GPT2Config", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}),
}


def without_tokenizer(folder: Path, family: str) -> Path:
    """A text encoder's folder with weights and a config alone."""
    transformers = pytest.importorskip("transformers")
    model, config, shape = FAMILIES[family]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**shape)).save_pretrained(folder)
    return folder
