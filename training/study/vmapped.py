"""Runs side by side: one vmapped hyper step, their scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from tiny_onn_func.tree import to_device
from training.run.config import RunConfig, hyper_params, statics
from training.step.accumulate import accumulated_step
from training.step.batch import Batch
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, hyper_step
from training.step.metrics import Metrics
from training.study.plan import check_alike

CPU = torch.device("cpu")


def vmapped_step(configs: Sequence[RunConfig], device: torch.device = CPU) -> Any:
    """(stacked states, stacked batches) -> (stacked states, stacked metrics): one hyper step of every run.

    Stacked logits of a teacher may follow the batches.

    The runs may differ in seed and in the numbers of the hyper step. A number that is the same in all stays a Python
    number, so that terms which no run has cost nothing; one that differs is mapped, and lies on the states' `device`.

    Raises:
        UserError: a static setting differs between the runs.
    """
    check_alike(configs)
    numbers, varied = split_numbers([hyper_params(config) for config in configs])
    varied = to_device(varied, device)
    model, fixed, parts = configs[0].model, statics(configs[0]), configs[0].accumulate
    one_run = partial(accumulated_step, parts=parts) if parts > 1 else hyper_step

    def step(
        state: TrainState, batch: Batch, varied: dict[str, Tensor], logits: Tensor | None = None
    ) -> tuple[TrainState, Metrics]:
        return one_run(state, batch, numbers._replace(**varied), model, **fixed, teacher_logits=logits)

    return lambda states, batches, *logits: vmap(step)(states, batches, varied, *logits)


def split_numbers(hypers: Sequence[HyperParams]) -> tuple[HyperParams, dict[str, Tensor]]:
    """(the first run's numbers, {name: (R,) values} of those in which the runs differ); float64, whole ones int64."""
    columns = dict(zip(HyperParams._fields, zip(*hypers, strict=True), strict=True))
    varied = {
        name: torch.tensor(values, dtype=torch.int64 if all(isinstance(v, int) for v in values) else torch.float64)
        for name, values in columns.items()
        if any(value != values[0] for value in values)
    }
    return hypers[0], varied
