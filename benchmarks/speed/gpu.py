"""On a GPU: tokens/s and FLOP utilisation of 0.42 billion parameters, the share of surprise, and how many runs fit.

    python -m benchmarks.speed.gpu [--peak-tflops 989] [--json FILE]

The large model: 28 layers, width 1,024, F 64, 32 experts, K 8, vocabulary 151,936; computed in bfloat16, with router,
surprise, parameters and moments in float32. FLOPs of a step: 6 per active matrix parameter and token, and 12 L S D per
token for attention; `--peak-tflops` is the device's dense bfloat16 figure (989 for an H100 or H200).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.func import vmap

from benchmarks.models import LARGE, a_batch, qwen3_moe
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.params import count_active_params, count_params
from tiny_onn_func.tree import merge, partition, stack, to_device, tree_map
from training import HyperParams, TrainState, hyper_step, init_state
from training.step.losses import language_modelling
from training.step.main_pass import StepOptions, gradients, main_gradients

SMALL = ModelConfig(257, 64, 2, 2, 1, 32, 32, 8, num_experts_per_tok=2)
HYPER = HyperParams(balance_weight=1.0)
LOW = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.speed.gpu: expected a CUDA device, found none; this benchmark has nothing to say without one"
        )
    figures: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    figures |= large_model(args.batch, args.sequence, args.peak_tflops) | many_runs()
    figures |= peer(args.batch, args.sequence)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def large_model(batch_size: int, seq: int, peak_tflops: float) -> dict[str, object]:
    """Tokens/s, utilisation, and the share of the gradients' time that surprise takes."""
    state, batch = on_cuda(LARGE, 0), to_device(a_batch(LARGE, batch_size, seq), "cuda")
    fast, router = partition(state.params)

    def plain(fast: dict, _: tuple) -> tuple[torch.Tensor, tuple]:
        low = tree_map(lambda leaf: leaf.to(LOW), fast)
        logits, _ = forward(merge(low, router), batch.input_ids, LARGE, attention_mask=batch.attention_mask)
        return language_modelling(logits, batch.labels).loss_sum, ()

    step = milliseconds(lambda: hyper_step(state, batch, HYPER, LARGE, compute_dtype=LOW))
    hooked = milliseconds(
        lambda: main_gradients(
            *partition(state.params), batch, HYPER, LARGE, state.step, StepOptions(compute_dtype=LOW)
        )
    )
    bare = milliseconds(lambda: gradients(plain, (fast,)))
    tokens = batch_size * seq
    active = count_active_params(LARGE, LARGE.routes_per_token)
    a_token = 6 * active + 12 * LARGE.num_hidden_layers * seq * LARGE.num_attention_heads * LARGE.head_dim
    return {
        "parameters": count_params(LARGE),
        "hyper step, ms": step,
        "tokens/s": round(tokens / step * 1e3),
        "share of the peak": round(a_token * tokens / step * 1e3 / peak_tflops / 1e12, 3),
        "gradients with surprise / without": round(hooked / bare, 3),
        "peak memory, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def many_runs() -> dict[str, object]:
    """Run-steps/s of 1, 2, 4 ... mapped small runs, until twice as many are not a tenth faster; 64 at least.

    The rate of one run is that of runs one after another.
    """
    batch, rates, runs = to_device(a_batch(SMALL, 8, 64), "cuda"), dict[int, float](), 1
    while runs <= 4096:
        states = stack([on_cuda(SMALL, seed) for seed in range(runs)])
        step = vmap(lambda state: hyper_step(state, batch, HYPER, SMALL, compute_dtype=LOW))
        rates[runs] = round(runs / milliseconds(partial(step, states)) * 1e3, 1)
        if runs >= 64 and rates[runs] < 1.1 * rates[runs // 2]:
            break
        runs *= 2
    return {"run-steps/s by runs at once": rates, "64 runs at once / one after another": round(rates[64] / rates[1], 2)}


def peer(batch_size: int, seq: int) -> dict[str, object]:
    """Tokens/s of transformers' Qwen3-MoE of the same sizes with grouped_mm, bfloat16 autocast and fused AdamW."""
    model = qwen3_moe(LARGE).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    batch = to_device(a_batch(LARGE, batch_size, seq), "cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"transformers, tokens/s": round(batch_size * seq / milliseconds(step) * 1e3)}


def on_cuda(config: ModelConfig, seed: int) -> TrainState:
    return to_device(init_state(config, torch.Generator().manual_seed(seed)), "cuda")


def milliseconds(subject: Callable[[], object], repetitions: int = 9) -> float:
    """Median wall time, the device's queue empty before and after."""
    for _ in range(3):
        subject()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        subject()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    main()
