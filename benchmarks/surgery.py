"""What does it cost to visit fewer experts after surgery? A small dense Qwen3, trained here, cut and scored at every K.

    python benchmarks/surgery.py [--steps N] [--num-experts E] [--bytes N] [--threads N]

The dense model reads the bytes of the Python standard library; the score is perplexity per byte on held-out modules.
The calibration text of the clusters is one of its modules.
"""

import argparse
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tiny_onn_func import load_pretrained
from training.data import Splits, batch_at, held_out_batches, open_corpus, scored_span
from training.evaluate import evaluate
from training.export import byte_tokenizer_files
from training.surgery import cut_into_experts

SEQUENCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--dense", help="folder of a dense Qwen3 of bytes to cut, instead of training one")
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    corpus = open_corpus("stdlib", holdout=0.1, split="auto", sequence_length=SEQUENCE)
    counts = sorted({max(1, given.num_experts * eighths // 8) for eighths in (1, 2, 3, 4, 6, 7, 8)}, reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(given.dense or Path(folder, "dense"))
        if given.dense is None:
            train_dense(corpus, dense, given.steps)
        print("| split | " + " | ".join(f"K = {k}" for k in counts) + " |")
        print("|---" * (len(counts) + 1) + "|")
        for split, name in (
            ("contiguous", "contiguous"),
            ("clusters", "clusters"),
            ("clusters", "clusters, cut for K"),
        ):
            row = []
            for k in counts:
                cut_for = k if name.endswith("K") else given.num_experts
                out = Path(folder, f"{split}-{cut_for}")
                if not out.exists():
                    cut_into_experts(
                        dense, out, num_experts=given.num_experts, num_experts_per_tok=cut_for, split=split,
                        calibration=argparse.__file__ if split == "clusters" else None,
                    )  # fmt: skip
                row.append(f"{perplexity(out, k, corpus, given.bytes):.2f}")
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def train_dense(corpus: Splits, folder: Path, steps: int) -> None:
    """A byte model of theirs, trained by a plain loop and saved with its tokenizer."""
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


def perplexity(folder: Path, experts_per_tok: int, corpus: Splits, max_bytes: int) -> float:
    """exp(nats per byte) of a result of surgery at K experts a token."""
    params, config = load_pretrained(folder)
    config = replace(config, num_experts_per_tok=experts_per_tok)
    batches = held_out_batches(corpus.held_out, 12, SEQUENCE, max_bytes=max_bytes)
    num_bytes = scored_span(corpus.held_out, max_bytes).num_bytes
    return math.exp(evaluate(params, config, batches, num_bytes, surprise_budget=0.5).nats_per_token)


if __name__ == "__main__":
    main()
