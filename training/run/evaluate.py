"""The held-out score of a model: nats per token, bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from einops import rearrange

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.tree import Tree
from training.step.batch import Batch
from training.step.losses import language_modelling
from training.step.metrics import average_k


class Score(NamedTuple):
    """What a model scores on some text."""

    nats_per_token: float
    bits_per_byte: float  # all nats, those of document boundaries too, over the bytes of the text
    accuracy: float  # share of tokens that the most probable one hits
    avg_k: float
    tokens: int
    bytes: int


def evaluate(
    params: Tree,
    config: ModelConfig,
    batches: Iterable[Batch],
    num_bytes: int,
    *,
    surprise_budget: float,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Score:
    """Score every target of the batches once.

    Args:
        batches: whose targets stand for `num_bytes` bytes of text.
        surprise_budget: as in training; it decides K where K is dynamic.
    """
    nats = correct = visits = 0.0
    tokens = real_tokens = 0
    with torch.no_grad():
        for batch in progress(batches):
            logits, trace = forward(
                params, batch.input_ids, config, attention_mask=batch.attention_mask, surprise_budget=surprise_budget
            )
            lm = language_modelling(logits, batch.labels)
            real = rearrange(batch.attention_mask != 0, "b s -> (b s)")
            nats, tokens = nats + float(lm.loss_sum), tokens + int(lm.targets)
            correct, real_tokens = correct + float(lm.correct), real_tokens + int(real.sum())
            visits += float(average_k(trace.active, real)) * int(real.sum())
    return Score(
        nats_per_token=nats / max(tokens, 1),
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        accuracy=correct / max(tokens, 1),
        avg_k=visits / max(real_tokens, 1),
        tokens=tokens,
        bytes=num_bytes,
    )
