"""A race to 1.88 nats a character on tinyshakespeare: `shakespeare_char.yaml` against a dense GPT of nanoGPT's recipe.

    python -m benchmarks.experiments.race TINYSHAKESPEARE.txt [--steps N] [--our-steps N] [--threads N] [--json FILE]

The dense model is nanoGPT's CPU recipe in torch.nn: 4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps,
learning rate 1e-3 to 1e-4, 100 steps of warm-up, AdamW (0.9, 0.99), decay 0.1, no dropout; published: 1.88 after them.
Both train on the same batches in turns of a few steps, so that a noisy moment meets both; only training is timed.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import machine
from training import Batch, hyper_step, init_state
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import Splits, open_corpus
from training.presets.find import HOME
from training.run.config import RunConfig, hyper_params
from training.run.evaluate import evaluate
from training.run.process import disable_heap_trimming
from training.run.settings import load_settings

GOAL, TURN, BYTES = 1.88, 50, 65536
CONFIG = HOME / "shakespeare_char.yaml"


class Racer(NamedTuple):
    step: Callable[[int, Batch], None]
    nats: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--our-steps", type=int, default=2000, help="at which our cosine ends")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    disable_heap_trimming()
    torch.set_num_threads(args.threads)
    print(machine(), flush=True)
    config = replace(load_settings(str(CONFIG)), steps=args.our_steps)
    corpus = open_corpus(args.text, holdout=config.holdout, split=config.split, sequence_length=config.sequence_length)
    racers = {"tiny-onn": tiny_onn(config, corpus), "dense": dense(config, corpus, args.steps)}
    seconds = dict.fromkeys(racers, 0.0)
    curves: dict[str, list[tuple[int, float, float]]] = {name: [] for name in racers}
    for begin in range(0, args.steps, TURN):
        batches = [batch_at(corpus.train, 0, step, 12, 64) for step in range(begin, min(begin + TURN, args.steps))]
        for name, racer in racers.items():
            if name == "tiny-onn" and begin >= args.our_steps:
                continue
            start = time.perf_counter()
            for step, batch in enumerate(batches, begin):
                racer.step(step, batch)
            seconds[name] += time.perf_counter() - start
            curves[name].append((begin + len(batches), seconds[name], racer.nats()))
        print(
            *(f"{name}: step {c[-1][0]}, {c[-1][1]:.0f} s, {c[-1][2]:.3f}" for name, c in curves.items()),
            sep="; ",
            flush=True,
        )
    arrived = next(((step, at) for step, at, nats in curves["tiny-onn"] if nats <= GOAL), None)
    last = curves["dense"][-1]
    print(f"\ndense: {last[2]:.3f} nats after {last[0]} steps in {last[1]:.0f} s")
    if arrived is None:
        print(f"tiny-onn did not reach {GOAL}: {curves['tiny-onn'][-1][2]:.3f}")
    else:
        print(
            f"tiny-onn: {GOAL} nats at step {arrived[0]} in {arrived[1]:.0f} s, "
            f"{arrived[1] / last[1]:.2f} of the dense time"
        )
    if args.json:
        figures = {"machine": machine(), "curves (step, seconds, nats)": curves}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def tiny_onn(config: RunConfig, corpus: Splits) -> Racer:
    hyper = hyper_params(config)
    state = [init_state(config.model, torch.Generator().manual_seed(0))]

    def step(_: int, batch: Batch) -> None:
        state[0] = hyper_step(state[0], batch, hyper, config.model)[0]

    def nats() -> float:
        batches = held_out_batches(corpus.held_out, 12, 64, max_bytes=BYTES)
        num_bytes = scored_span(corpus.held_out, BYTES).num_bytes
        budget = float(config.hyper.pi_alpha)
        return evaluate(state[0].params, config.model, batches, num_bytes, surprise_budget=budget).nats_per_token

    return Racer(step, nats)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.split(x))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norms[0](x)).group(3, dim=-1)


class GPT(nn.Module):
    def __init__(self, vocab: int, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, leaf in self.named_parameters():
            if leaf.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(leaf, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


def dense(config: RunConfig, corpus: Splits, steps: int) -> Racer:
    torch.manual_seed(0)
    model = GPT(config.model.vocab_size)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def step(number: int, batch: Batch) -> None:
        warm, done = (number + 1) / 100, (number - 100) / max(steps - 100, 1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warm if warm < 1 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * done))
        loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def nats() -> float:
        def losses() -> Iterator[tuple[float, int]]:
            for batch in held_out_batches(corpus.held_out, 12, 64, max_bytes=BYTES):
                logits, labels = model(batch.input_ids).flatten(0, 1), batch.labels.flatten()
                yield float(F.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())

        sums = [sum(column) for column in zip(*losses(), strict=True)]
        return sums[0] / sums[1]

    return Racer(step, nats)


if __name__ == "__main__":
    main()
