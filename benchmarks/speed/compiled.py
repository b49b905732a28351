"""Gain of `--compile`: time of tracing and compiling a hyper step, and its time beside the step as it is.

python -m benchmarks.speed.compiled [--sizes w32 A] [--repetitions N] [--threads N] [--json FILE]
"""

import time
from collections.abc import Callable

import torch

from benchmarks.models import a_batch
from benchmarks.speed.runs import SIZES
from benchmarks.timing import arguments, interleaved, table, write_json
from training import Batch, HyperParams, TrainState, hyper_step, init_state
from training.step.compile import compile_step

HYPER = HyperParams(balance_weight=1.0)


def main() -> None:
    args = arguments(__doc__, 15, list(SIZES), ["w32"])
    results = {}
    for name in args.sizes:
        subjects = both(name)
        results[name] = interleaved(subjects, args.repetitions)
        print(table(name, results[name], "as it is"), flush=True)
    if args.json:
        write_json(args.json, results)


def both(name: str) -> dict[str, Callable[[], object]]:
    """The step as it is and compiled; says how long that took."""
    config, batch_size, seq, _ = SIZES[name]
    state, batch = init_state(config, torch.Generator().manual_seed(0)), a_batch(config, batch_size, seq)

    def step(state: TrainState, batch: Batch) -> object:
        return hyper_step(state, batch, HYPER, config)

    start = time.perf_counter()
    compiled = compile_step(step, state, batch)
    traced = time.perf_counter()
    compiled(state, batch)
    print(f"{name}: traced in {traced - start:.0f} s, first call {time.perf_counter() - traced:.0f} s", flush=True)
    return {"as it is": lambda: step(state, batch), "compiled": lambda: compiled(state, batch)}


if __name__ == "__main__":
    main()
