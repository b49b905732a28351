"""Cost of surprise: the hyper step against itself without hooks, and against a plain step of Qwen3-MoE.

    python -m benchmarks.speed.step [--sizes A B] [--repetitions N] [--threads N] [--json FILE]

The peer is `transformers`' Qwen3MoeForCausalLM with grouped-matmul experts, PyTorch's AdamW, the same sizes and batch:
forward, backward, clipping, update. Ours does the same and measures surprise and trains the router beside it.

Share of the limit: three times the forward's counted operations (`count_active_flops`) over the hyper step's time,
against the best rate that a float32 matmul of PyTorch reaches in the same process, of three shapes, in the same rounds.
"""

from collections.abc import Callable

import torch

from benchmarks.models import SIZES, a_batch, qwen3_moe
from benchmarks.timing import Timing, arguments, interleaved, ratio, table, write_json
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.params import count_active_flops
from tiny_onn_func.tree import merge, partition
from training import HyperParams, hyper_step, init_state
from training.step.losses import language_modelling
from training.step.main_pass import gradients, main_gradients

HYPER = HyperParams(balance_weight=1.0)


def main() -> None:
    args = arguments(__doc__, 11, list(SIZES))
    results = {}
    for name in args.sizes:
        subjects = ours(*SIZES[name]) | peer(*SIZES[name]) | matmuls()
        results[name] = interleaved(subjects, args.repetitions)
        print(table(f"Size {name}", results[name], "plain step of transformers"), flush=True)
        cost = ratio(results[name], "gradients and surprise", "gradients without hooks")
        print(share_of_the_limit(*SIZES[name], results[name]), flush=True)
        print(
            "gradients and surprise against gradients without hooks: {:.3f} ({:.3f} to {:.3f})\n".format(*cost),
            flush=True,
        )
    if args.json:
        write_json(args.json, results)


def ours(config: ModelConfig, batch_size: int, seq: int) -> dict[str, Callable[[], object]]:
    state = init_state(config, torch.Generator().manual_seed(0))
    batch = a_batch(config, batch_size, seq)
    fast, router = partition(state.params)

    def plain(fast: dict, _: tuple) -> tuple[torch.Tensor, tuple]:
        logits, _ = forward(merge(fast, router), batch.input_ids, config, attention_mask=batch.attention_mask)
        return language_modelling(logits, batch.labels).loss_sum, ()

    return {
        "gradients without hooks": lambda: gradients(plain, (fast,)),
        "gradients and surprise": lambda: main_gradients(*partition(state.params), batch, HYPER, config, state.step),
        "hyper step": lambda: hyper_step(state, batch, HYPER, config),
        "hyper step in bfloat16": lambda: hyper_step(state, batch, HYPER, config, compute_dtype=torch.bfloat16),
    }


def peer(config: ModelConfig, batch_size: int, seq: int) -> dict[str, Callable[[], object]]:
    model = qwen3_moe(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    batch = a_batch(config, batch_size, seq)

    def compute() -> None:
        model.zero_grad()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()

    def step() -> None:
        compute()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"gradients of transformers": compute, "plain step of transformers": step}


SHAPES = {f"matmul of {m} x {k} x {n}": (m, k, n) for m, k, n in ((1024, 1024, 1024), (512, 512, 512), (768, 128, 384))}


def matmuls() -> dict[str, Callable[[], object]]:
    """Products of PyTorch whose best rate stands for the machine's limit."""
    factors = {name: (torch.randn(m, k), torch.randn(k, n)) for name, (m, k, n) in SHAPES.items()}
    return {name: lambda a=a, b=b: a @ b for name, (a, b) in factors.items()}  # type: ignore[misc]


def share_of_the_limit(config: ModelConfig, batch_size: int, seq: int, timings: dict[str, Timing]) -> str:
    """Counted operations of a step, their rate in the hyper step, and the share of the best matmul's rate."""
    flops = 3 * batch_size * seq * count_active_flops(config, float(config.num_experts_per_tok), seq)
    rate = flops / timings["hyper step"].median / 1e6
    limit = max(2 * m * k * n / timings[name].low / 1e6 for name, (m, k, n) in SHAPES.items())
    return (
        f"{flops / 1e9:.2f} GFLOP a step, hyper step at {rate:.0f} GFLOP/s, best matmul at {limit:.0f}: "
        f"{rate / limit:.2f} of the limit"
    )


if __name__ == "__main__":
    main()
