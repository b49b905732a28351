"""Speed of vmapped runs: one hyper step of many runs against the same runs one after another.

python -m benchmarks.speed.runs [--sizes w32 w64 A] [--repetitions N] [--threads N] [--json FILE]
"""

from collections.abc import Callable

import torch
from torch.func import vmap

from benchmarks.models import SIZES as STEP_SIZES
from benchmarks.models import a_batch
from benchmarks.timing import arguments, interleaved, table, write_json
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import stack
from training import HyperParams, hyper_step, init_state

SIZES = {  # configuration, batch, sequence, numbers of runs
    "w32": (ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=2), 4, 32, (16, 32)),
    "w64": (ModelConfig(257, 64, 2, 2, 1, 32, 32, 8, num_experts_per_tok=2), 8, 64, (16,)),
    "A": (*STEP_SIZES["A"], (8,)),
}


def main() -> None:
    args = arguments(__doc__, 9, list(SIZES))
    results = {}
    for name in args.sizes:
        for runs in SIZES[name][3]:
            title = f"{name}, {runs} runs"
            results[title] = interleaved(subjects(*SIZES[name][:3], runs), args.repetitions)
            print(table(title, results[title], "together"), flush=True)
    if args.json:
        write_json(args.json, results)


def subjects(config: ModelConfig, batch_size: int, seq: int, runs: int) -> dict[str, Callable[[], object]]:
    """The same states, batch and learning rates, mapped and in a loop."""
    batch = a_batch(config, batch_size, seq)
    states = [init_state(config, torch.Generator().manual_seed(seed)) for seed in range(runs)]
    stacked, rates = stack(states), torch.linspace(1e-3, 5e-3, runs)
    hyper = HyperParams(balance_weight=1.0)
    mapped = vmap(lambda state, lr: hyper_step(state, batch, hyper._replace(lr=lr), config))
    alone = [hyper._replace(lr=float(lr)) for lr in rates]

    def one_after_another() -> None:
        for state, numbers in zip(states, alone, strict=True):
            hyper_step(state, batch, numbers, config)

    return {"one after another": one_after_another, "together": lambda: mapped(stacked, rates)}


if __name__ == "__main__":
    main()
