"""Bytes that autograd saves of a forward pass: a linear fit over models that differ in one size.

    python -m benchmarks.memory.saved

The coefficients are `SAVED` of `benchmarks.scaling.plan`, rounded; they hold for this code on a CPU.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from benchmarks.models import a_batch
from benchmarks.scaling.plan import saved_of
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import leaves, partition
from training import HyperParams, init_state
from training.step.hooks import SurpriseHookManager
from training.step.main_pass import StepOptions, main_gradients

BASE = {"V": 300, "D": 64, "L": 2, "H": 4, "G": 2, "d": 16, "F": 32, "E": 8, "K": 2, "B": 4, "S": 32}
CHANGES: tuple[dict[str, int], ...] = (
    {}, {"V": 600}, {"D": 128}, {"L": 4}, {"d": 32}, {"F": 64}, {"E": 16}, {"K": 4}, {"B": 8}, {"G": 4}, {"H": 8},
    {"S": 64}, {"V": 600, "D": 128}, {"F": 64, "K": 4}, {"D": 128, "K": 4}, {"L": 4, "S": 64}, {"H": 8, "S": 64},
)  # fmt: skip
TERMS = ("L T D", "L T Q", "L N F", "L N D", "L T E", "T V")


def main() -> None:
    torch.set_num_threads(1)
    for dtype, width in ((None, 4), (torch.bfloat16, 2)):
        saved = np.array([measured(model, batch, length, dtype) for model, batch, length in models()])
        sizes = np.array([terms(model, batch * length) for model, batch, length in models()], dtype=float)
        fitted, _ = nnls(sizes / saved[:, None], np.ones(len(saved)))
        rounded = np.array([saved_of(model, batch * length, width) for model, batch, length in models()])
        values = ", ".join(f"{name} {value:.1f}" for name, value in zip(TERMS, fitted, strict=True))
        worst, off = (np.abs(guess / saved - 1).max() for guess in (sizes @ fitted, rounded))
        print(f"{width} bytes a number: {values}; at most {worst:.1%} off, {off:.1%} as rounded in SAVED")


def models() -> Iterator[tuple[ModelConfig, int, int]]:
    """(model, batch, sequence length), one size or two changed at a time."""
    for change in CHANGES:
        n = BASE | change
        model = ModelConfig(n["V"], n["D"], n["L"], n["H"], n["G"], n["d"], n["F"], n["E"], num_experts_per_tok=n["K"])
        yield model, n["B"], n["S"]


def terms(model: ModelConfig, tokens: int) -> list[int]:
    """Products of sizes in which the saved bytes are linear."""
    layers, rows, queries = (
        model.num_hidden_layers, tokens * model.routes_per_token, model.num_attention_heads * model.head_dim,
    )  # fmt: skip
    return [
        layers * tokens * model.hidden_size, layers * tokens * queries, layers * rows * model.moe_intermediate_size,
        layers * rows * model.hidden_size, layers * tokens * model.num_experts, tokens * model.vocab_size,
    ]  # fmt: skip


def measured(model: ModelConfig, batch: int, length: int, dtype: torch.dtype | None) -> int:
    """Bytes of all storages that autograd keeps in a hyper step's main pass, parameters left out."""
    state = init_state(model, torch.Generator().manual_seed(0))
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves(state.params)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[place] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        main_gradients(
            *partition(state.params), a_batch(model, batch, length), HyperParams(balance_weight=1.0), model, state.step,
            StepOptions(compute_dtype=dtype), hooks_factory=lambda *given, **more: SurpriseHookManager(*given, **more),
        )  # fmt: skip
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


if __name__ == "__main__":
    main()
