"""What does surprise cost? The hyper step against itself without hooks, and against a plain step of Qwen3-MoE.

    python -m benchmarks.speed.step [--sizes A B] [--repetitions N] [--threads N] [--json FILE]

The peer is `transformers`' Qwen3MoeForCausalLM with grouped-matmul experts, PyTorch's AdamW, the same sizes and batch:
forward, backward, clipping, update. Ours does the same and measures surprise and trains the router beside it.
"""

import argparse
import os
import warnings
from collections.abc import Callable

import torch

from benchmarks.models import SIZES, a_batch
from benchmarks.timing import interleaved, machine, ratio, table, write_json
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.tree import merge, partition
from training import HyperParams, hyper_step, init_state
from training.run.process import disable_heap_trimming
from training.step.losses import language_modelling
from training.step.main_pass import gradients, main_gradients

HYPER = HyperParams(balance_weight=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    disable_heap_trimming()
    torch.set_num_threads(args.threads)
    print(machine())
    results = {}
    for name in args.sizes:
        subjects = ours(*SIZES[name]) | peer(*SIZES[name])
        results[name] = interleaved(subjects, args.repetitions)
        print(table(f"Size {name}", results[name], "plain step of transformers"), flush=True)
        cost = ratio(results[name], "gradients and surprise", "gradients without hooks")
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
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    sizes = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is one of its keyword arguments
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim, moe_intermediate_size=config.moe_intermediate_size, intermediate_size=64,
        num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True,
        tie_word_embeddings=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    sizes._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(sizes)
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


if __name__ == "__main__":
    main()
