"""A hook point of one's own: the gradient at each expert's output, read in a plain backward pass.

python examples/own_hook_point.py
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.experts import ApplyW2, Rows, apply_w2
from tiny_onn_func.tree import tree_map
from training import Batch, HyperParams, per_token_surprise
from training.step.surprise import scatter_rows


def recording(slopes: Tensor) -> ApplyW2:
    """`apply_w2` that also writes ||dLoss / dy|| of each routed row into (layers, tokens, experts)."""

    def apply(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        output = apply_w2(layer, hidden, w2, rows)

        def record(grad: Tensor) -> None:
            slopes[layer] = scatter_rows(grad.norm(dim=-1), rows.token, rows.expert, *slopes.shape[1:])

        output.register_hook(record)
        return output

    return apply


def main() -> None:
    """Compare the expert of least slope with that of least surprise, token by token."""
    config = ModelConfig(257, 32, 2, 2, 1, 16, 16, 8, num_experts_per_tok=4)
    generator = torch.Generator().manual_seed(0)
    params = tree_map(lambda leaf: leaf.requires_grad_(), init_params(config, generator))
    ids = torch.randint(257, (4, 33), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(4, 32, dtype=torch.int64))
    slopes = torch.full((2, batch.input_ids.numel(), 8), torch.inf)
    logits, _ = forward(params, batch.input_ids, config, apply_w2=recording(slopes))
    cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").backward()
    surprise = per_token_surprise(tree_map(Tensor.detach, params), batch, config, HyperParams())
    for layer in range(2):
        same = (slopes[layer].argmin(-1) == surprise[layer].argmin(-1)).float().mean()
        print(f"layer {layer}: {float(same):.2f} of the tokens have one expert of least slope and of least surprise")


if __name__ == "__main__":
    main()
