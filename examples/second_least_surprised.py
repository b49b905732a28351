"""A rule without a state: teach the router each token's second least surprised expert.

python examples/second_least_surprised.py
"""

from typing import Any

import torch
from torch import Tensor

from tiny_onn_func import ModelConfig
from training import Batch, HyperParams, Rule, Targets, hyper_step, init_state


def second_least(
    state: Any, surprise: Tensor, trace: Any, batch: Batch, hyper: HyperParams, step: Tensor
) -> tuple[Any, Targets]:
    """Surprise (L, T, E) is +inf where a token did not go: a token teaches if it went to two experts."""
    values, experts = surprise.topk(2, dim=-1, largest=False)
    return state, Targets(experts[..., 1], informative=values[..., 1].isfinite())


RULE = Rule(init=lambda config: (), update=second_least)


def main() -> None:
    """Ten steps; the share of tokens whose router prefers the second least surprised expert."""
    config = ModelConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(257, (4, 33), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))
    state = init_state(config, generator, rule=RULE)
    for number in range(10):
        state, metrics = hyper_step(state, batch, HyperParams(router_lr=0.02), config, rule=RULE)
        print(f"step {number}: loss {float(metrics.main_loss):.3f}, gating accuracy {float(metrics.gating_acc):.3f}")


if __name__ == "__main__":
    main()
