"""A training loop of one's own: batches of a text, hyper steps, a held-out score; no run folder, no command line.

python examples/own_loop.py
"""

import math

import torch

from tiny_onn_func import ModelConfig
from training import HyperParams, hyper_step, init_state
from training.data import batch_at, held_out_batches, open_corpus, scored_span
from training.run.evaluate import evaluate

SEED, STEPS, ROWS, LENGTH, BYTES = 0, 60, 8, 32, 4096


def main() -> None:
    """Train on a part of the standard library; print losses, and the bits per byte that are held out."""
    text = open_corpus("stdlib:json/*.py", sequence_length=LENGTH)
    config = ModelConfig(
        vocab_size=text.train.tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    hyper = HyperParams(lr=1e-2, balance_weight=1.0, warmup_steps=5, total_steps=STEPS)
    state = init_state(config, torch.Generator().manual_seed(SEED))
    for step in range(STEPS):
        batch = batch_at(text.train, SEED, step, ROWS, LENGTH)
        state, metrics = hyper_step(state, batch, hyper, config)
        if step % 10 == 9:
            print(f"step {step}: loss {float(metrics.main_loss):.3f}, experts a token {float(metrics.avg_k):.1f}")
    batches = held_out_batches(text.held_out, ROWS, LENGTH, max_bytes=BYTES)
    num_bytes, budget = scored_span(text.held_out, BYTES).num_bytes, float(hyper.pi_alpha)
    score = evaluate(state.params, config, batches, num_bytes, surprise_budget=budget)
    print(f"held out: {score.bits_per_byte:.3f} bits per byte, {math.log2(config.vocab_size):.3f} untrained")


if __name__ == "__main__":
    main()
