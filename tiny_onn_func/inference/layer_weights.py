"""A layer's parameters as decoding uses them: laid out once a text, matrices of one input side by side."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.tree import ROUTER_LEAVES


class LayerWeights(NamedTuple):
    """A layer's parameters; matrices that multiply the same input lie side by side."""

    input_norm: Float[Tensor, " dim"]
    qkv: Float[Tensor, "dim all_heads"]
    qk_norm: Float[Tensor, "rotated_heads head_dim"]
    o_proj: Float[Tensor, "heads dim"]
    value_embed: Float[Tensor, "vocab groups"] | None
    token_bias: Float[Tensor, "vocab dim"] | None
    post_norm: Float[Tensor, " dim"]
    router: Mapping[str, Tensor]  # its leaves by name; the matrix in the dtype of decisions
    w13: Float[Tensor, "experts dim both"]
    w2: Float[Tensor, "experts inner dim"]
    shared: tuple[Tensor, Tensor] | None  # (w13, w2) of the expert that every token visits
    each: tuple[tuple[Tensor, Tensor], ...]  # (w13, w2) of every expert
    finite: bool  # True if all of w13 and w2 is known to be


def lay_out(layer: Mapping[str, Any]) -> LayerWeights:
    """Concatenate what multiplies the same input, and split what is used expert by expert."""
    attn, moe = layer["self_attn"], layer["moe"]
    head_dim = attn["q_norm"].shape[0]
    heads, groups = (attn[name].shape[1] // head_dim for name in ("q_proj", "k_proj"))
    w13, w2 = torch.cat((moe["w1"], moe["w3"]), dim=-1), moe["w2"]
    return LayerWeights(
        layer["input_layernorm"],
        torch.cat([attn[name] for name in ("q_proj", "k_proj", "v_proj")], dim=1),
        torch.cat((attn["q_norm"].expand(heads, -1), attn["k_norm"].expand(groups, -1))),
        attn["o_proj"],
        attn.get("value_embed"),
        layer.get("token_bias"),
        layer["post_attention_layernorm"],
        {
            name: leaf.to(wide_dtype(moe["w1"].dtype)) if name == "router" else leaf
            for name, leaf in moe.items()
            if name in ROUTER_LEAVES
        },
        w13,
        w2,
        (torch.cat((moe["shared_w1"], moe["shared_w3"]), dim=-1), moe["shared_w2"]) if "shared_w1" in moe else None,
        tuple(zip(w13.unbind(0), w2.unbind(0), strict=True)),
        reads(w2.device) and bool(w13.isfinite().all() & w2.isfinite().all()),
    )


def reads(device: torch.device) -> bool:
    """True if the host may read a tensor's values; on an accelerator every read would wait for it."""
    return device.type == "cpu"
