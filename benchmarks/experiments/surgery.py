"""Cost of visiting fewer experts after surgery: a small dense Qwen3, trained here, cut and scored at every K.

    python -m benchmarks.experiments.surgery [--steps N] [--num-experts E] [--bytes N] [--threads N]
    python -m benchmarks.experiments.surgery --memory

The dense model reads the bytes of the Python standard library; the score is perplexity per byte on held-out modules.
The calibration text of the clusters is one of its modules. With --memory: the peak of the process that cuts a larger
checkpoint, as the system tells it, next to the checkpoint's size (Linux).
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tiny_onn_func import load_pretrained
from training.commands.export import byte_tokenizer_files
from training.commands.surgery import cut_into_experts
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import Splits, open_corpus
from training.run.evaluate import evaluate

SEQUENCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--dense", help="folder of a dense Qwen3 of bytes to cut, instead of training one")
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        return memory_table()
    corpus = open_corpus("stdlib", holdout=0.1, split="auto", sequence_length=SEQUENCE)
    counts = sorted({max(1, args.num_experts * eighths // 8) for eighths in (1, 2, 3, 4, 6, 7, 8)}, reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(args.dense or Path(folder, "dense"))
        if args.dense is None:
            train_dense(corpus, dense, args.steps)
        print("| split | " + " | ".join(f"K = {k}" for k in counts) + " |")
        print("|---" * (len(counts) + 1) + "|")
        for split, name in (
            ("contiguous", "contiguous"),
            ("clusters", "clusters"),
            ("clusters", "clusters, router at random"),
            ("clusters", "clusters, cut for K"),
        ):
            row = []
            for k in counts:
                cut_for = k if name.endswith("K") else args.num_experts
                out = Path(folder, f"{split}-{cut_for}")
                if not out.exists():
                    cut_into_experts(
                        dense, out, num_experts=args.num_experts, num_experts_per_tok=cut_for, split=split,
                        calibration=argparse.__file__ if split == "clusters" else None,
                    )  # fmt: skip
                row.append(f"{perplexity(out, k, corpus, args.bytes, blind=name.endswith('random')):.2f}")
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def train_dense(corpus: Splits, folder: Path, steps: int) -> None:
    """A dense Qwen3 byte model of transformers, trained by a plain loop and saved with its tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=257, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = batch_at(corpus.train, 0, step, 12, SEQUENCE)
        logits = model(batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"dense: {steps} steps, last batch {loss.item():.3f} nats per byte\n", flush=True)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer_files(SEQUENCE)["tokenizer.json"])


def perplexity(folder: Path, experts_per_tok: int, corpus: Splits, max_bytes: int, *, blind: bool) -> float:
    """exp(nats per byte) of a result of surgery at K experts a token; with `blind`, of a random router."""
    params, config = load_pretrained(folder)
    if blind:
        router = params["layers"]["moe"]["router"]
        noise = torch.randn(router.shape, generator=torch.Generator().manual_seed(0))
        params["layers"]["moe"]["router"] = 1e-6 * noise / config.hidden_size**0.5
    config = replace(config, num_experts_per_tok=experts_per_tok)
    batches = held_out_batches(corpus.held_out, 12, SEQUENCE, max_bytes=max_bytes)
    num_bytes = scored_span(corpus.held_out, max_bytes).num_bytes
    return math.exp(evaluate(params, config, batches, num_bytes, surprise_budget=0.5).nats_per_token)


PEAK = """
import sys, torch, training.commands.surgery
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
text = {"split": "clusters", "calibration": sys.argv[3]} if sys.argv[3:] else {}
training.commands.surgery.cut_into_experts(sys.argv[1], sys.argv[2], num_experts=32, **text)
print(before, peak())
"""


def memory_table() -> None:
    """Two checkpoints of 540 to 600 MiB: one that is mostly layers, one that is mostly its embedding."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| checkpoint | split | MiB in, out | peak, MiB | of the larger | above the program | of the larger |")
    print("|---" * 7 + "|")
    for name, dtype, vocab_size, layers in (
        ("10 layers, float32", torch.float32, 257, 10),
        ("8 layers, vocabulary of 151,936, bfloat16", torch.bfloat16, 151_936, 8),
    ):
        with tempfile.TemporaryDirectory() as folder:
            dense = Path(folder, "dense")
            save_dense(dense, dtype, vocab_size, layers)
            for split in ("contiguous", "clusters")[: 2 if vocab_size == 257 else 1]:  # the other has no tokenizer
                out, text = Path(folder, split), [argparse.__file__] if split == "clusters" else []
                command = [sys.executable, "-c", PEAK, str(dense), str(out), *text]
                program, peak = map(float, subprocess.check_output(command, text=True).split())
                sizes = [sum(file.stat().st_size for file in place.iterdir()) / 2**20 for place in (dense, out)]
                cells = [name, split, f"{sizes[0]:.0f}, {sizes[1]:.0f}"]
                cells += [f"{size:.0f} | {size / max(sizes):.2f}" for size in (peak, peak - program)]
                print(f"| {' | '.join(cells)} |", flush=True)


def save_dense(folder: Path, dtype: torch.dtype, vocab_size: int, layers: int) -> None:
    """A Qwen3 with random weights and the widths of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_default_dtype(dtype)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )).save_pretrained(folder)  # fmt: skip
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
