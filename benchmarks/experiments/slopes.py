"""Slopes of a later loss in the router's numbers: reverse mode through several hyper steps.

    python -m benchmarks.experiments.slopes [--data stdlib] [--seeds 0 1 2 3 4] [--steps 200] [--every 20] [--ahead 4]

Runs with two teachers (the main loss with coupling 1, and surprise with weight 0.1), sizes and rates of the preset
`routers`, all seeds in one vmapped program. Every some steps: d (main loss on a batch that is not
trained on, after `ahead` more steps) / d log(number), exact, by reverse mode through those steps. Positive: less of the
number would have been better. Means over the seeds' own means, nats, with 95 % t-intervals over seeds.

The budget `pi_alpha` decides by a count, K = 1 + #(cumulative mass < budget), so under dynamic K its slope is exactly 0
and it cannot be learned by gradient. What it does is printed as a difference instead: the later loss after steps with a
budget 10 % larger, minus that with one 10 % smaller; both are measured with the run's own budget.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vmap

from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import stack
from training import Batch, HyperParams, TrainState, hyper_step, init_state
from training.data.batches import batch_at
from training.data.corpus import open_corpus
from training.study.comparison.statistics import t_interval

MODEL = ModelConfig(257, 32, 2, 2, 1, 16, 16, 16, num_experts_per_tok=4)
HYPER = HyperParams(
    lr=0.016, router_lr=0.016, warmup_steps=30, surprise_weight=0.1, router_coupling=1.0, balance_weight=0.01,
    z_weight=0.001, weight_decay=0.1,
)  # fmt: skip
NUMBERS = ("surprise_weight", "balance_weight", "z_weight", "router_lr", "lr")
BATCH, LENGTH = 8, 32
UNSEEN = 1_000_000  # step whose batch no run trains on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--ahead", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = open_corpus(args.data, sequence_length=LENGTH)

    def batches(step: int) -> Batch:
        return stack([batch_at(corpus.train, seed, step, BATCH, LENGTH) for seed in args.seeds])

    for title, model, names in (
        ("K = 4", MODEL, NUMBERS),
        ("dynamic K", replace(MODEL, num_experts_per_tok=-1), ("pi_alpha", *NUMBERS)),
    ):
        by_name = slopes(model, args.seeds, args.steps, args.every, args.ahead, names, batches)
        print(f"{title}: {args.steps} steps, every {args.every}, {args.ahead} ahead, seeds {args.seeds}")
        for name, values in by_name.items():
            mean, low, high = t_interval(values)
            print(f"  {name:32} {mean:+.5f} ({low:+.5f} to {high:+.5f})")


def slopes(
    model: ModelConfig, seeds: Sequence[int], steps: int, every: int, ahead: int, names: Sequence[str],
    batches: Callable[[int], Batch],
) -> dict[str, list[float]]:  # fmt: skip
    """Name -> its mean slope in every run."""
    hyper = HYPER._replace(total_steps=steps)
    step = vmap(lambda state, batch: hyper_step(state, batch, hyper, model)[0])
    states = stack([init_state(model, torch.Generator().manual_seed(seed)) for seed in seeds])
    by_name: dict[str, list[Tensor]] = {}
    zeros = torch.zeros(len(seeds))
    for number in range(steps):
        if number and number % every == 0:
            upcoming, unseen = [batches(number + i) for i in range(ahead)], batches(UNSEEN + number)
            for name in names:
                later = partial(later_loss, name=name, hyper=hyper, model=model)
                loss, slope = (vmap(function, in_dims=(0, 0, [0] * ahead, 0)) for function in (later, grad(later)))
                by_name.setdefault(f"d / d log {name}", []).append(slope(zeros, states, upcoming, unseen))
                if name == "pi_alpha":
                    more, less = (loss(zeros + math.log(size), states, upcoming, unseen) for size in (1.1, 0.9))
                    by_name.setdefault("pi_alpha 10 % more - 10 % less", []).append(more - less)
        states = step(states, batches(number))
    return {name: torch.stack(values).mean(dim=0).tolist() for name, values in by_name.items()}


def later_loss(
    log_change: Tensor, state: TrainState, batches: list[Batch], unseen: Batch, *, name: str, hyper: HyperParams,
    model: ModelConfig,
) -> Tensor:  # fmt: skip
    """Main loss on `unseen` after a step with each of the batches, `name` being exp(log_change) times as large."""
    changed = hyper._replace(**{name: getattr(hyper, name) * log_change.exp()})
    for batch in batches:
        state, _ = hyper_step(state, batch, changed, model)
    return hyper_step(state, unseen, hyper, model)[1].main_loss


if __name__ == "__main__":
    main()
