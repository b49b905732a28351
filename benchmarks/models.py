"""Sizes of the models that the benchmarks time, and a batch for them."""

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
