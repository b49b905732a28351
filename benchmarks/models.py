"""Sizes of the models that the benchmarks time, a batch for them, and the same model of transformers."""

import os
import warnings
from typing import Any

import torch

from tiny_onn_func import ModelConfig
from training import Batch

SIZES = {  # configuration, batch, sequence
    "A": (ModelConfig(257, 128, 4, 4, 2, 32, 64, 16, num_experts_per_tok=4), 12, 64),
    "B": (ModelConfig(257, 256, 4, 4, 2, 64, 64, 32, num_experts_per_tok=4), 8, 128),
}


def a_batch(config: ModelConfig, batch: int, seq: int) -> Batch:
    ids = torch.randint(0, 256, (batch, seq + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(batch, seq, dtype=torch.int64))


LARGE = ModelConfig(151_936, 1024, 28, 16, 8, 64, 64, 32, num_experts_per_tok=8)


def qwen3_moe(config: ModelConfig) -> Any:
    """transformers' Qwen3MoeForCausalLM of these sizes, with grouped-matmul experts and random weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    sizes = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is one of its keyword arguments
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim, moe_intermediate_size=config.moe_intermediate_size, intermediate_size=64,
        num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True,
        tie_word_embeddings=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    sizes._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(sizes)
