"""Cost of saving: the default run with and without checkpoints, and the longest stall of a large model's steps.

    python -m benchmarks.memory.saving [--rounds N] [--steps N] [--large-steps N] [--threads N] [--json FILE]

The default run saves every 500 of 2,000 steps: four checkpoints. Here a round takes `--steps` steps of the default
preset without saving and as many with one checkpoint at its begin, waited for at its end; the share of 500 steps is
(with - without) / (time of 500 steps). The large model (8 layers, width 512, 32 experts, vocabulary 32,000: about 45
million parameters, half a gigabyte of state) saves once, in the background and, for comparison, in the foreground.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.models import a_batch
from benchmarks.timing import machine
from tiny_onn_func import ModelConfig
from tiny_onn_func.params import count_params
from training import HyperParams, TrainState, hyper_step, init_state
from training.run.config import DEFAULT_MODEL
from training.run.process import disable_heap_trimming
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import named_tensors, save_checkpoint

LARGE = ModelConfig(32_000, 512, 8, 8, 4, 64, 64, 32, num_experts_per_tok=4)
EVERY = 500  # steps between two checkpoints of the default run
LARGE_ROUNDS = 5
HYPER = HyperParams()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large-steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    disable_heap_trimming()
    torch.set_num_threads(args.threads)
    figures = {**machine(), **small(args.rounds, args.steps), **large(args.large_steps)}
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def small(rounds: int, steps: int) -> dict[str, object]:
    """Milliseconds that a checkpoint adds to a default run, and their share of the steps between two."""
    step, state = subject(DEFAULT_MODEL, 12, 64)
    without, added = [], []
    with tempfile.TemporaryDirectory() as folder:
        write = partial(save_checkpoint, folder, config_dict=asdict(DEFAULT_MODEL), keep=2)
        for number in range(rounds + 1):
            plain, state = timed(step, state, steps)
            start = time.perf_counter()
            with BackgroundSaver(write) as saver:
                saver.save(named_tensors(state))
                _, state = timed(step, state, steps)
            if number:  # the first round warms up
                without.append(plain / steps)
                added.append(time.perf_counter() - start - plain)
    share = statistics.median(added) / (EVERY * statistics.median(without))
    return {
        "default run, ms a step": round(statistics.median(without) * 1e3, 1),
        "default run, ms that a checkpoint adds": [round(value * 1e3, 1) for value in quartiles(added)],
        "default run, share of saving": f"{share:.2%}",
    }


def large(steps: int) -> dict[str, object]:
    """Seconds of a step, of the longest while a checkpoint is in flight, and of a checkpoint in the foreground."""
    step, state = subject(LARGE, 4, 128)
    _, state = timed(step, state, 2)
    quiet, state = each(step, state, steps)
    median, stalls = statistics.median(quiet), []
    with tempfile.TemporaryDirectory() as folder:
        write = partial(save_checkpoint, folder, config_dict=asdict(LARGE), keep=1)
        start = time.perf_counter()
        write(state)
        foreground = time.perf_counter() - start
        for _ in range(LARGE_ROUNDS):
            with BackgroundSaver(write) as saver:
                saver.save(named_tensors(state))
                busy, state = each(step, state, steps)
            stalls.append(round((max(busy) - median) / median, 2))
    return {
        "large model, parameters": count_params(LARGE),
        "large model, s a step": round(median, 3),
        "large model, s of a checkpoint in the foreground": round(foreground, 2),
        "large model, longest stall while one is written, in steps, per round": stalls,
        "large model, median of them": statistics.median(stalls),
    }


def subject(config: ModelConfig, rows: int, length: int) -> tuple[Callable[[TrainState], TrainState], TrainState]:
    batch = a_batch(config, rows, length)
    return lambda state: hyper_step(state, batch, HYPER, config)[0], init_state(
        config, torch.Generator().manual_seed(0)
    )


def timed(step: Callable[[TrainState], TrainState], state: TrainState, steps: int) -> tuple[float, TrainState]:
    start = time.perf_counter()
    for _ in range(steps):
        state = step(state)
    return time.perf_counter() - start, state


def each(step: Callable[[TrainState], TrainState], state: TrainState, steps: int) -> tuple[list[float], TrainState]:
    took = []
    for _ in range(steps):
        seconds, state = timed(step, state, 1)
        took.append(seconds)
    return took, state


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


if __name__ == "__main__":
    main()
