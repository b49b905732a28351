"""A rule with a state: the expert of least surprise on average over all past visits of the token's id.

python examples/average_surprise_of_a_token.py
"""

import torch
from torch import Tensor

from tiny_onn_func import ModelConfig
from training import Batch, HyperParams, Rule, Targets, hyper_step, init_state

State = dict[str, Tensor]  # (L, V, E): sum of surprise, and number of visits


def init(config: ModelConfig) -> State:
    """No visit yet."""
    shape = config.num_hidden_layers, config.vocab_size, config.num_experts
    return {name: torch.zeros(shape) for name in ("sum", "visits")}


def update(
    state: State, surprise: Tensor, trace: object, batch: Batch, hyper: HyperParams, step: Tensor
) -> tuple[State, Targets]:
    """Add this batch's visits to the table, then look each token up in it."""
    visited = surprise.isfinite()
    index = batch.input_ids.flatten()[None, :, None].expand_as(surprise)
    new = {"sum": torch.where(visited, surprise, 0.0), "visits": visited.to(surprise.dtype)}
    state = {name: table.scatter_add(1, index, new[name]) for name, table in state.items()}
    visits = state["visits"].gather(1, index)
    mean = torch.where(visits > 0, state["sum"].gather(1, index) / visits, torch.inf)
    return state, Targets(mean.argmin(dim=-1), informative=visited.any(dim=-1) & (mean.isfinite().sum(dim=-1) > 1))


RULE = Rule(init, update)


def main() -> None:
    """Ten steps; the share of tokens whose router prefers the expert of the table."""
    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=2)
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))
    state = init_state(config, torch.Generator().manual_seed(0), rule=RULE)
    for number in range(10):
        state, metrics = hyper_step(state, batch, HyperParams(router_lr=0.02), config, rule=RULE)
        print(f"step {number}: loss {float(metrics.main_loss):.3f}, gating accuracy {float(metrics.gating_acc):.3f}")


if __name__ == "__main__":
    main()
