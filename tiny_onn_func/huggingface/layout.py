"""Names and shapes of the tensors in a Qwen3 or Qwen3-MoE checkpoint, and which of our leaves each one is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.params import Spec, param_specs

Spelling = Literal["experts", "fused", "dense"]  # of the MLP: one tensor an expert, one for all of them, no experts

ATTENTION = {  # ours -> (theirs, whether (in, out) is transposed there)
    "input_layernorm": ("input_layernorm", False),
    "self_attn.q_proj": ("self_attn.q_proj", True),
    "self_attn.k_proj": ("self_attn.k_proj", True),
    "self_attn.v_proj": ("self_attn.v_proj", True),
    "self_attn.o_proj": ("self_attn.o_proj", True),
    "self_attn.q_norm": ("self_attn.q_norm", False),
    "self_attn.k_norm": ("self_attn.k_norm", False),
    "post_attention_layernorm": ("post_attention_layernorm", False),
}
TABLES = {"value_embeddings": "self_attn.value_embed", "token_bias": "token_bias"}  # setting -> leaf of a layer
EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Piece(NamedTuple):
    """One tensor of a checkpoint: a slice of a leaf, or of two leaves one behind the other."""

    name: str
    leaves: tuple[str, ...]
    at: tuple[int, ...]  # of the leaf: (), (layer,) or (layer, expert)
    transposed: bool

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        shape = specs[self.leaves[0]].shape[len(self.at) :]
        if not self.transposed:
            return shape
        *front, ours_in, ours_out = shape
        return (*front, ours_out * len(self.leaves), ours_in)

    def take(self, flat: Mapping[str, Tensor]) -> Tensor:
        """Slice (and transpose) the leaf into the tensor of the checkpoint, contiguous; for pieces of one leaf."""
        part = flat[self.leaves[0]][self.at]
        return (part.mT if self.transposed else part).contiguous()

    def put(self, flat: Mapping[str, Tensor], tensor: Tensor) -> None:
        """Copy the checkpoint's tensor into our leaves."""
        parts: Sequence[Tensor] = (tensor,) if len(self.leaves) == 1 else tensor.chunk(len(self.leaves), dim=-2)
        for leaf, part in zip(self.leaves, parts, strict=True):
            flat[leaf][self.at].copy_(part.mT if self.transposed else part)


def layout(config: ModelConfig, spelling: Spelling, *, bias: bool = False) -> Iterator[Iterator[Piece]]:
    """Every tensor of a checkpoint, in groups that are read and written together: embedding, layers, norm, head.

    Lazy: a configuration that claims a billion layers or experts costs nothing until somebody asks for them.

    Args:
        bias: whether the router's selection bias is stored, too, under a name of our own.
    """
    yield iter((Piece(EMBEDDING, ("embed_tokens",), (), False),))
    for layer in range(config.num_hidden_layers):
        yield _layer(config, spelling, layer, bias)
    if config.ngram_order > 1:
        yield iter((Piece("model.ngram_embed.weight", ("ngram_embed",), (), False),))
    yield iter((Piece("model.norm.weight", ("norm",), (), False),))
    if not config.tie_word_embeddings:
        yield iter((Piece(HEAD, ("lm_head",), (), True),))


def _layer(config: ModelConfig, spelling: Spelling, layer: int, bias: bool) -> Iterator[Piece]:
    prefix = f"model.layers.{layer}"
    for ours, (theirs, transposed) in ATTENTION.items():
        yield Piece(f"{prefix}.{theirs}.weight", (f"layers.{ours}",), (layer,), transposed)
    for setting, leaf in TABLES.items():
        if getattr(config, setting):
            yield Piece(f"{prefix}.{leaf}.weight", (f"layers.{leaf}",), (layer,), False)
    if spelling == "dense":
        for ours, theirs in EXPERT.items():
            yield Piece(f"{prefix}.mlp.{theirs}.weight", (f"layers.moe.{ours}",), (layer, 0), True)
        return
    if config.shared_expert_intermediate_size:
        for ours, theirs in EXPERT.items():
            yield Piece(f"{prefix}.mlp.shared_expert.{theirs}.weight", (f"layers.moe.shared_{ours}",), (layer,), True)
    yield Piece(f"{prefix}.mlp.gate.weight", ("layers.moe.router",), (layer,), True)
    if bias:
        yield Piece(f"{prefix}.mlp.gate.router_bias", ("layers.moe.router_bias",), (layer,), False)
    for leaf in ("token_table", "table_on", "default_output"):
        if f"layers.moe.{leaf}" in param_specs(config):
            yield Piece(f"{prefix}.mlp.gate.{leaf}", (f"layers.moe.{leaf}",), (layer,), False)
    if spelling == "fused":
        yield Piece(f"{prefix}.mlp.experts.gate_up_proj", ("layers.moe.w1", "layers.moe.w3"), (layer,), True)
        yield Piece(f"{prefix}.mlp.experts.down_proj", ("layers.moe.w2",), (layer,), True)
        return
    for expert in range(config.num_experts):
        for ours, theirs in EXPERT.items():
            name = f"{prefix}.mlp.experts.{expert}.{theirs}.weight"
            yield Piece(name, (f"layers.moe.{ours}",), (layer, expert), True)
