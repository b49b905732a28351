"""A gradient through a step: how the loss after it depends on the logarithm of its learning rate, which then learns.

python examples/meta_gradient.py
"""

import torch
from torch import Tensor
from torch.func import grad_and_value

from tiny_onn_func import ModelConfig
from training import Batch, HyperParams, TrainState, hyper_step, init_state

META_LR = 0.5


def main() -> None:
    """Let the learning rate follow the slope of the next step's loss, from one that is far too small."""
    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=2)
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))

    def loss_after(log_lr: Tensor, state: TrainState) -> tuple[Tensor, TrainState]:
        # a coupling of 1 lets the slope pass through the router, too
        after, _ = hyper_step(state, batch, HyperParams(lr=log_lr.exp(), router_coupling=1.0), config)
        return hyper_step(after, batch, HyperParams(router_coupling=1.0), config)[1].main_loss, after

    state, log_lr = init_state(config, torch.Generator().manual_seed(0)), torch.tensor(1e-4).log()
    for number in range(10):
        slope, (loss, state) = grad_and_value(loss_after, has_aux=True)(log_lr, state)
        log_lr = log_lr - META_LR * slope.sign()
        print(f"step {number}: loss {float(loss):.3f}, slope {float(slope):+.4f}, next rate {float(log_lr.exp()):.5f}")


if __name__ == "__main__":
    main()
