"""Program of the loop: a hyper step with the run's settings, and the batch of a step."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from tiny_onn_func.tree import to_device
from training.data.batches import batch_at
from training.distributed.parallel_step import parallel_step
from training.run.config import hyper_params, statics
from training.run.context import Run
from training.step.accumulate import accumulated_step
from training.step.batch import Batch
from training.step.compile import compile_step
from training.step.hyper_step import TrainState, hyper_step
from training.step.metrics import Metrics

Program = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def program(run: Run, state: TrainState) -> Program:
    """(state, batch) -> (state, metrics): the hyper step with the run's settings, its teacher, compiled if wanted."""
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher
    if run.team.world.size > 1:
        return _program_of_many(run)

    step = partial(accumulated_step, parts=config.accumulate) if config.accumulate > 1 else hyper_step

    def taught(state: TrainState, batch: Batch, logits: Tensor | None) -> tuple[TrainState, Metrics]:
        return step(state, batch, hyper, config.model, **statics(config), teacher_logits=logits)

    if not config.compile:
        return lambda state, batch: taught(state, batch, None if teacher is None else teacher(batch))
    batch = step_batch(run, 0)
    if teacher is None:
        return compile_step(lambda state, batch: taught(state, batch, None), state, batch)
    compiled = compile_step(taught, state, batch, teacher(batch))
    return lambda state, batch: compiled(state, batch, teacher(batch))


def _program_of_many(run: Run) -> Program:
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = run.team.rows(batch)
        logits = None if teacher is None else teacher(own)
        return parallel_step(
            state, own, hyper, config.model, run.team.layout, parts=config.accumulate, **statics(config),
            teacher_logits=logits,
        )  # fmt: skip

    return step


def step_batch(run: Run, step: int) -> Batch:
    """The batch of a step, counted from 0, on the run's device; the seed decides it."""
    config = run.config
    batch = batch_at(run.corpus.train, config.seed, step, config.batch_size, config.sequence_length, config.pack)
    if run.device.type == "cuda":  # from pinned memory the copy goes on beside the program
        batch = Batch(*(part.pin_memory() for part in batch))
    return to_device(batch, run.device)


class Batches:
    """The batches of a run; on an accelerator the next one is drawn and copied while a step is computed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next: tuple[int, Batch] | None = None

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        kept, self._next = self._next, None
        return kept[1] if kept is not None and kept[0] == step else step_batch(self._run, step)

    def prepare(self, step: int) -> None:
        """Begin to copy the batch of a step; does nothing on a CPU, where no copy can run beside the step."""
        if self._run.device.type != "cpu":
            self._next = step, step_batch(self._run, step)
