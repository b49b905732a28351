"""The held-out score of a model: nats per token, bits per byte."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.tree import Tree
from training.data.batches import held_out_batches, scored_span
from training.data.corpus import Splits
from training.run.config import RunConfig
from training.step.batch import IGNORE_INDEX, Batch
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


SCORED_ROWS = 32  # windows of a batch of held-out text, or as many as are trained on


def score_runs(params: Tree, configs: Sequence[RunConfig], corpus: Splits, max_bytes: int | None) -> list[Score]:
    """What `evaluate` says of every run, on the first `max_bytes` of the held-out text; `params` are stacked."""
    model, length, rows = configs[0].model, configs[0].sequence_length, max(SCORED_ROWS, configs[0].batch_size)
    budgets = torch.tensor([config.hyper.pi_alpha for config in configs], dtype=torch.float64)

    def one(params: Tree, budget: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, trace = forward(
            params, batch.input_ids, model, attention_mask=batch.attention_mask, surprise_budget=budget
        )
        lm = language_modelling(logits, batch.labels)
        real = (batch.attention_mask != 0).flatten()
        return lm.loss_sum, lm.correct, average_k(trace.active, real) * real.sum()

    sums = torch.zeros(3, len(configs), dtype=torch.float64)
    tokens = real_tokens = 0
    with torch.no_grad():
        for batch in held_out_batches(corpus.held_out, rows, length, max_bytes=max_bytes, pack=configs[0].pack):
            sums += torch.stack([part.double() for part in vmap(one, in_dims=(0, 0, None))(params, budgets, batch)])
            tokens += int((batch.labels != IGNORE_INDEX).sum())
            real_tokens += int((batch.attention_mask != 0).sum())
    num_bytes = scored_span(corpus.held_out, max_bytes).num_bytes
    return [
        Score(nats / tokens, nats / math.log(2) / num_bytes, correct / tokens, visits / real_tokens, tokens, num_bytes)
        for nats, correct, visits in sums.T.tolist()
    ]
