"""Kernel of a whole pass: loss of a batch, its gradient and the surprise of every row, in one call for all layers."""

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.kernels.runtime import SIZE, addresses, check, check_leaves, loaded, refuse, threads

F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool
IGNORE_INDEX = -100  # as in torch.nn.functional.cross_entropy
Measured = Literal["nothing", "norms", "dots"]
MEASURED: tuple[Measured, ...] = ("nothing", "norms", "dots")
SIZES = (
    "runs", "layers", "batch", "seq", "vocab", "hidden", "heads", "groups", "dim", "inner", "experts", "slots", "least",
    "dynamic", "by_token", "measured", "masks", "none", "threads",
)  # fmt: skip
LEAVES = {  # as C numbers them: name -> the axes behind those of runs and layers
    "embed_tokens": ("vocab", "hidden"),
    "layers.input_layernorm": ("hidden",),
    "layers.self_attn.q_proj": ("hidden", "queries"),
    "layers.self_attn.k_proj": ("hidden", "keys"),
    "layers.self_attn.v_proj": ("hidden", "keys"),
    "layers.self_attn.o_proj": ("queries", "hidden"),
    "layers.self_attn.q_norm": ("dim",),
    "layers.self_attn.k_norm": ("dim",),
    "layers.post_attention_layernorm": ("hidden",),
    "layers.moe.router": ("hidden", "experts"),
    "layers.moe.router_bias": ("experts",),
    "layers.moe.w1": ("experts", "hidden", "inner"),
    "layers.moe.w3": ("experts", "hidden", "inner"),
    "layers.moe.w2": ("experts", "inner", "hidden"),
    "norm": ("hidden",),
    "lm_head": ("hidden", "vocab"),
}
SETTINGS = (  # of ModelConfig, which a pass follows
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "min_experts_per_tok", "max_experts_per_tok",
    "rms_norm_eps", "rope_theta", "tie_word_embeddings", "zero_init", "routing",
)  # fmt: skip
ROUTER = frozenset({"layers.moe.router", "layers.moe.router_bias"})  # leaves without a gradient


class _Sizes(ctypes.Structure):
    _fields_ = (*((name, SIZE) for name in SIZES), ("eps", ctypes.c_double))


class DecoderPass(NamedTuple):
    """Gradients of the summed cross entropy by dotted name, and what was observed in the pass."""

    grads: dict[str, Tensor]
    surprise: Float[Tensor, "*runs layers tokens experts"]
    router_inputs: Float[Tensor, "*runs layers tokens dim"]
    router_logits: Float[Tensor, "*runs layers tokens experts"]
    weights: Float[Tensor, "*runs layers tokens slots"]
    expert_ids: Int64[Tensor, "*runs layers tokens slots"]
    active: Bool[Tensor, "*runs layers tokens slots"]
    real: Bool[Tensor, "*runs tokens"]
    loss_sum: Float[Tensor, "*runs"]
    entropy_sum: Float[Tensor, "*runs"]
    targets: Int64[Tensor, "*runs"]
    correct: Int64[Tensor, "*runs"]
    nonfinite: Int64[Tensor, "*runs"]


Shape = tuple[int, ...]


class _Plan(NamedTuple):
    """Everything about a pass but its tensors, laid out once for the shapes of a run."""

    sizes: _Sizes
    room: int  # bytes
    leaves: dict[str, Shape]
    outputs: tuple[tuple[Shape, torch.dtype], ...]  # in the order in which C has them


@cache
def _plan(
    config: ModelConfig, runs: Shape, masks: int, batch: int, seq: int, measured: Measured, threads: int
) -> _Plan:
    dim, heads, groups, layers = (
        config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers,
    )  # fmt: skip
    sizes = _Sizes(
        runs=runs[0] if runs else 1, layers=layers, batch=batch, seq=seq, vocab=config.vocab_size,
        hidden=config.hidden_size, heads=heads, groups=groups, dim=dim, inner=config.moe_intermediate_size,
        experts=config.num_experts, slots=config.routes_per_token, least=config.min_experts_per_tok,
        dynamic=config.num_experts_per_tok == DYNAMIC_K, by_token=config.routing == "token",
        measured=MEASURED.index(measured), masks=masks, none=IGNORE_INDEX, threads=threads, eps=config.rms_norm_eps,
    )  # fmt: skip
    known = {"queries": heads * dim, "keys": groups * dim} | {name: getattr(sizes, name) for name in SIZES}
    leaves = {
        name: (*runs, *((layers,) if name.startswith("layers.") else ()), *(known[axis] for axis in axes))
        for name, axes in LEAVES.items()
        if name != "lm_head" or not config.tie_word_embeddings
    }
    by_token = layers, *runs, batch * seq
    by_expert, by_slot = (*by_token, config.num_experts), (*by_token, config.routes_per_token)
    outputs = (
        (by_expert, F32), ((*by_token, config.hidden_size), F32), (by_expert, F32), (by_slot, F32), (by_slot, I64),
        (by_slot, BOOL), ((*runs, batch * seq), BOOL), (runs, F32), (runs, F32), (runs, I64), (runs, I64), (runs, I64),
    )  # fmt: skip
    return _Plan(sizes, loaded().decoder_room(ctypes.byref(sizes)), leaves, outputs)


def decoder_pass(
    leaves: Mapping[str, Float[Tensor, "..."]],
    input_ids: Int64[Tensor, "*runs batch seq"],
    labels: Int64[Tensor, "*runs batch seq"],
    attention_mask: Int64[Tensor, "masks batch seq"],
    budgets: Float64[Tensor, "*runs"],
    rotary: tuple[Float[Tensor, "seq dim"], Float[Tensor, "seq dim"]],
    *,
    config: ModelConfig,
    measured: Measured,
) -> DecoderPass:
    """Forward and backward pass of `decoder.forward` and the summed cross entropy, with the surprise of every row.

    Args:
        leaves: parameters by dotted name; at most one axis of runs in front of each.
        labels: -100 asks for nothing, as do those of padding.
        attention_mask: of each run, or one of all.
        budgets: surprise budget of each run; read by dynamic K only.
        rotary: cosines and sines of the positions' angles.
        measured: the surprise of a row: ||hidden|| * ||gradient of its output||, or <output, gradient>; that of
            `nothing` is left as the memory was.

    Raises:
        ValueError: a tensor of another shape or dtype, a missing leaf, or a routing that the kernel does not know.
        IndexError: an id or a label that the vocabulary does not have, or a negative number in the mask.
    """
    if config.routing not in ("router", "token"):
        raise ValueError(f"decoder_pass: expected routing of router or token, got {config.routing}")
    by_position, masks = input_ids.shape, attention_mask.shape[0]
    *runs, batch, seq = by_position
    if len(runs) > 1 or masks not in (1, *runs) or not by_position.numel():
        raise ValueError(
            f"decoder_pass: expected tokens of one axis of runs at most, and a mask of each or of all, got "
            f"{tuple(by_position)} and {masks} masks"
        )
    plan = _plan(config, tuple(runs), masks, batch, seq, measured, threads())
    angles = (seq, config.head_dim), F32
    check_leaves("decoder_pass", "parameters", leaves, plan.leaves)
    check(
        "decoder_pass", input_ids=(input_ids, by_position, I64), labels=(labels, by_position, I64),
        attention_mask=(attention_mask, (masks, batch, seq), I64), budgets=(budgets, tuple(runs), F64),
        cosines=(rotary[0], *angles), sines=(rotary[1], *angles),
    )  # fmt: skip
    read = {name: leaves[name].contiguous() for name in plan.leaves}
    grads = {name: torch.empty_like(t) for name, t in read.items() if name not in ROUTER}
    inputs = [t.contiguous() for t in (input_ids, labels, attention_mask, budgets, *rotary)]
    outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in plan.outputs]
    memory = torch.empty(plan.room, dtype=torch.uint8)
    at_leaves, at_grads = (addresses([tree.get(name) for name in LEAVES]) for tree in (read, grads))
    sizes, at_inputs, at_outputs = ctypes.byref(plan.sizes), addresses(inputs), addresses(outputs)
    if code := loaded().decoder_pass(sizes, at_leaves, at_inputs, at_grads, at_outputs, memory.data_ptr()):
        wanted = f"input_ids and labels in [0, {config.vocab_size}), {IGNORE_INDEX} as a label, a mask of 0 or more"
        refuse("decoder_pass", code, wanted, "one token's experts, or one head's scores, got none; use a smaller batch")
    by_layer = (t.transpose(0, 1) for t in outputs[:6]) if runs else outputs[:6]
    return DecoderPass(grads, *by_layer, *outputs[6:])
