"""Choice of the default guards: arms that differ in coefficients only, all trained in one vmapped program.

    python benchmarks/experiments/guards.py [--steps N] [--seeds N]

Prints a Markdown table: held-out bits per byte of each arm on the standard library's text, and how routing looks.
"""

import argparse
import time

import torch
from torch.func import vmap

from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import stack, unstack
from training import HyperParams, hyper_step, init_state
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import open_corpus
from training.run.evaluate import evaluate
from training.terminal import progress

CONFIG = ModelConfig(257, 64, 2, 2, 1, 32, 32, 16, num_experts_per_tok=4)
BATCH, LENGTH, SCORED = 8, 64, 8192
BASE = HyperParams(lr=5e-3, router_lr=1e-3, warmup_steps=20)
ARMS = {
    "surprise, no guard": BASE,
    "surprise + balance 1": BASE._replace(balance_weight=1.0),
    "surprise + bias 0.01": BASE._replace(bias_speed=0.01),
    "surprise 0.1 + coupling 1 + balance 0.01": BASE._replace(
        surprise_weight=0.1, router_coupling=1.0, balance_weight=0.01
    ),
    "coupling 1 + balance 0.01, no surprise": BASE._replace(
        surprise_weight=0.0, router_coupling=1.0, balance_weight=0.01
    ),
    "frozen random router": BASE._replace(router_lr=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    runs = [(name, seed) for name in ARMS for seed in range(args.seeds)]
    as_numbers = [
        [torch.tensor(float(number)) for number in ARMS[name]._replace(total_steps=args.steps)] for name, _ in runs
    ]
    hypers = stack([HyperParams(*numbers) for numbers in as_numbers])
    states = stack([init_state(CONFIG, torch.Generator().manual_seed(seed)) for _, seed in runs])
    corpus = open_corpus("stdlib", sequence_length=LENGTH)
    start = time.perf_counter()
    for step in progress(range(args.steps), total=args.steps, unit="step"):
        batch = batch_at(corpus.train, 0, step, BATCH, LENGTH)
        states, metrics = vmap(lambda state, hyper, batch=batch: hyper_step(state, batch, hyper, CONFIG))(
            states, hypers
        )
    seconds = time.perf_counter() - start
    print(
        f"{len(runs)} runs of {args.steps} steps of {BATCH} x {LENGTH} bytes in {seconds:.0f} s;",
        f"{CONFIG.num_hidden_layers} layers of {CONFIG.num_experts} experts, K = {CONFIG.num_experts_per_tok}\n",
    )
    print(
        "| arm | seed | held-out bits per byte | MaxVio | dead experts | gating accuracy |\n|---|---|---|---|---|---|"
    )
    for run, (name, seed) in enumerate(runs):
        params = unstack(states.params)[run]
        batches = held_out_batches(corpus.held_out, 32, LENGTH, max_bytes=SCORED)
        num_bytes = scored_span(corpus.held_out, SCORED).num_bytes
        score = evaluate(params, CONFIG, batches, num_bytes, surprise_budget=0.5)
        watched = (metrics.max_vio, metrics.dead_experts, metrics.gating_acc)
        vio, dead, gating = (float(values[run]) for values in watched)
        print(f"| {name} | {seed} | {score.bits_per_byte:.3f} | {vio:.2f} | {dead:.0f} | {gating:.2f} |", flush=True)


if __name__ == "__main__":
    main()
