"""Three surprise budgets in one program: runs that differ in a number are one `vmap` of the step.

python examples/vmapped_budgets.py
"""

import torch
from torch import Tensor
from torch.func import vmap

from tiny_onn_func import ModelConfig
from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.tree import stack
from training import Batch, HyperParams, Metrics, TrainState, hyper_step, init_state

BUDGETS = (0.2, 0.5, 0.9)


def main() -> None:
    """Train a run of each budget for twenty steps; print what each visits and how it learns."""
    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=DYNAMIC_K)
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))

    def step(state: TrainState, budget: Tensor) -> tuple[TrainState, Metrics]:
        return hyper_step(state, batch, HyperParams(lr=1e-2, pi_alpha=budget), config)

    states = stack([init_state(config, torch.Generator().manual_seed(0)) for _ in BUDGETS])
    for _ in range(20):
        states, metrics = vmap(step)(states, torch.tensor(BUDGETS))
    for budget, experts, loss in zip(BUDGETS, metrics.avg_k.tolist(), metrics.main_loss.tolist(), strict=True):
        print(f"budget {budget}: {experts:.2f} experts a token, loss {loss:.3f}")


if __name__ == "__main__":
    main()
