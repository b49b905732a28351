"""Runs side by side: one vmapped hyper step, their scores."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.decoder import forward
from tiny_onn_func.tree import Tree
from training.data.batches import held_out_batches, scored_span
from training.data.corpus import Splits
from training.run.config import RunConfig, hyper_params, statics
from training.run.evaluate import Score
from training.step.batch import IGNORE_INDEX, Batch
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, hyper_step
from training.step.losses import language_modelling
from training.step.metrics import Metrics, average_k
from training.study_plan import check_alike

SCORED_ROWS = 32  # windows of a batch of held-out text, or as many as are trained on


def mapped_step(configs: Sequence[RunConfig]) -> Any:
    """(stacked states, stacked batches) -> (stacked states, stacked metrics): one hyper step of every run.

    Stacked logits of a teacher may follow the batches.

    The runs may differ in seed and in the numbers of the hyper step. A number that is the same in all stays a Python
    number, so that terms which no run has cost nothing; one that differs is mapped.

    Raises:
        UserError: a static setting differs between the runs.
    """
    check_alike(configs)
    numbers, varied = split_numbers([hyper_params(config) for config in configs])
    model, fixed = configs[0].model, statics(configs[0])

    def one(
        state: TrainState, batch: Batch, varied: dict[str, Tensor], logits: Tensor | None = None
    ) -> tuple[TrainState, Metrics]:
        return hyper_step(state, batch, numbers._replace(**varied), model, **fixed, teacher_logits=logits)

    return lambda states, batches, *logits: vmap(one)(states, batches, varied, *logits)


def split_numbers(hypers: Sequence[HyperParams]) -> tuple[HyperParams, dict[str, Tensor]]:
    """(the first run's numbers, {name: (R,) values} of those in which the runs differ); float64, whole ones int64."""
    columns = dict(zip(HyperParams._fields, zip(*hypers, strict=True), strict=True))
    varied = {
        name: torch.tensor(values, dtype=torch.int64 if all(isinstance(v, int) for v in values) else torch.float64)
        for name, values in columns.items()
        if any(value != values[0] for value in values)
    }
    return hypers[0], varied


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
