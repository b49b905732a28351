"""The held-out score of models: nats per token, bits per byte."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.tree import Tree, device_of, leaves, number_dtype, to_device, tree_map
from training.data.batches import held_out_batches, scored_span
from training.data.corpus import Splits
from training.errors import UserError
from training.fields import Field
from training.run.config import RunConfig
from training.step.batch import IGNORE_INDEX, Batch, without_padding_labels
from training.step.losses import language_modelling
from training.step.sums import count_visits

SCORED_ROWS = 32  # windows of a batch of held-out text of a study, or as many as are trained on
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


class Score(NamedTuple):
    """Score of a model on a text."""

    nats_per_token: float
    bits_per_byte: float  # all nats, those of document boundaries too, over the bytes of the text
    accuracy: float  # share of tokens that the most probable one hits
    avg_k: float
    tokens: int
    bytes: int


DURING = {  # in the record of a step after which the run was scored
    "held_out_nats": Field("nats per token", "Loss on the first `eval_bytes` of the held-out text, after the step."),
    "held_out_bits_per_byte": Field("bits per byte", "The same loss per byte of the scored text."),
}


def recorded(score: Score) -> dict[str, float]:
    """Fields of a score in the record of a step."""
    return dict(zip(DURING, (score.nats_per_token, score.bits_per_byte), strict=True))


def evaluate(
    params: Tree,
    config: ModelConfig,
    batches: Iterable[Batch],
    num_bytes: int,
    *,
    surprise_budget: float,
    progress: Progress = iter,
) -> Score:
    """Score every target of the batches once: `evaluate_runs` of one run."""
    runs = tree_map(lambda leaf: leaf.unsqueeze(0), params)
    return evaluate_runs(runs, config, batches, num_bytes, surprise_budgets=(surprise_budget,), progress=progress)[0]


def evaluate_runs(
    params: Tree,
    config: ModelConfig,
    batches: Iterable[Batch],
    num_bytes: int,
    *,
    surprise_budgets: Sequence[float],
    progress: Progress = iter,
) -> list[Score]:
    """Score every target of the batches once with each of R models.

    Args:
        params: stacked, leaves (R, ...).
        batches: whose targets stand for `num_bytes` bytes of text.
        surprise_budgets: R of them in (0, 1], as in training; they decide K where K is dynamic.

    Raises:
        UserError: there is nothing to score.
        ValueError: budgets that are out of range or not one a model, or less than no bytes.
    """
    _check_numbers(leaves(params)[0].shape[0], num_bytes, surprise_budgets)

    def sums(params: Tree, budget: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, trace = forward(
            params, batch.input_ids, config, attention_mask=batch.attention_mask, surprise_budget=budget
        )
        lm = language_modelling(logits, batch.labels)
        real = rearrange(batch.attention_mask != 0, "b s -> (b s)")
        return lm.loss_sum, lm.correct, count_visits(trace.active, real)

    device = device_of(params)
    budgets = torch.tensor(surprise_budgets, dtype=number_dtype(device), device=device)
    totals, targets, real_tokens = torch.zeros(3, len(surprise_budgets), dtype=torch.float64), 0, 0
    with torch.no_grad():
        for batch in map(without_padding_labels, progress(batches)):
            by_run = vmap(sums, in_dims=(0, 0, None))(params, budgets, to_device(batch, device))
            totals += torch.stack([part.cpu().double() for part in by_run])
            targets += int((batch.labels != IGNORE_INDEX).sum())
            real_tokens += int((batch.attention_mask != 0).sum())
    if not (targets and num_bytes):
        raise UserError("held-out text: expected a target to score, got none; give more text")
    visitable = config.num_hidden_layers * real_tokens
    return [
        Score(
            nats_per_token=nats / targets,
            bits_per_byte=nats / math.log(2) / num_bytes,
            accuracy=correct / targets,
            avg_k=visits / visitable,
            tokens=targets,
            bytes=num_bytes,
        )
        for nats, correct, visits in totals.T.tolist()
    ]


def _check_numbers(models: int, num_bytes: int, budgets: Sequence[float]) -> None:
    if len(budgets) != models:
        raise ValueError(f"surprise_budgets: expected one for each of {models} models, got {len(budgets)}")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"surprise_budget: expected a number in (0, 1], got {budget}; take that of the training")
    if num_bytes < 0:
        raise ValueError(f"num_bytes: expected the bytes of the text, 1 or more, got {num_bytes}; count them")


def score_runs(params: Tree, configs: Sequence[RunConfig], corpus: Splits, max_bytes: int | None) -> list[Score]:
    """Score the stacked runs of a study on the first `max_bytes` of the held-out text."""
    first = configs[0]
    batches = held_out_batches(
        corpus.held_out, max(SCORED_ROWS, first.batch_size), first.sequence_length, max_bytes=max_bytes, pack=first.pack
    )
    num_bytes = scored_span(corpus.held_out, max_bytes).num_bytes
    budgets = [float(config.hyper.pi_alpha) for config in configs]
    return evaluate_runs(params, first.model, batches, num_bytes, surprise_budgets=budgets)
