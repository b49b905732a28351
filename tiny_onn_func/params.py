"""One spec tree, shape and initialiser of every leaf; parameters and counts are derived from it."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, flatten, unflatten


class Spec(NamedTuple):
    """Shape of a leaf and the standard deviation of its normal initialiser, or the constant that fills it."""

    shape: tuple[int, ...]
    std: float | None = None
    fill: float = 0.0


ROUTER_STD = 0.02  # near-uniform routing at the start: a budget of 0.5 begins with about half of the experts
EMBEDDING_STD = 0.02


def param_specs(config: ModelConfig) -> dict[str, Spec]:
    """Dotted name -> Spec, in the order of the tree, for every leaf of the parameters.

    Layers are stacked on a leading axis L, experts on E; weights are (in, out).

    Matrices start at 1 / sqrt(fan in), so that activations keep their size whatever the widths; the two that write
    into the residual stream are smaller by sqrt(2 L), one for each write (GPT-2), or zero. Tables that are looked up
    beside the embedding start at zero.
    """
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.moe_intermediate_size
    experts, head_dim = config.num_experts, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    residual = 0.0 if config.zero_init else 1 / math.sqrt(2 * layers)

    def norm(*shape: int) -> Spec:
        return Spec(shape, fill=1.0)

    def matrix(*shape: int, gain: float = 1.0) -> Spec:
        return Spec(shape, std=gain / math.sqrt(shape[-2]))

    specs = {
        "embed_tokens": Spec((config.vocab_size, width), std=EMBEDDING_STD),
        "layers.input_layernorm": norm(layers, width),
        "layers.self_attn.q_proj": matrix(layers, width, queries),
        "layers.self_attn.k_proj": matrix(layers, width, keys),
        "layers.self_attn.v_proj": matrix(layers, width, keys),
        "layers.self_attn.o_proj": matrix(layers, queries, width, gain=residual),
        "layers.self_attn.q_norm": norm(layers, head_dim),
        "layers.self_attn.k_norm": norm(layers, head_dim),
        "layers.post_attention_layernorm": norm(layers, width),
        "layers.moe.router": Spec((layers, width, experts), std=ROUTER_STD),
        "layers.moe.router_bias": Spec((layers, experts)),
        "layers.moe.w1": matrix(layers, experts, width, inner),
        "layers.moe.w3": matrix(layers, experts, width, inner),
        "layers.moe.w2": matrix(layers, experts, inner, width, gain=residual),
        "norm": norm(width),
    }
    if config.has_table:
        specs["layers.moe.token_table"] = Spec((layers, config.vocab_size, experts))  # of the router, but never learned
    if config.routing == "stable":
        specs["layers.moe.table_on"] = Spec((layers, 1))
    if config.default_outputs:
        specs["layers.moe.default_output"] = Spec((layers, experts, width))
    if shared := config.shared_expert_intermediate_size:
        specs["layers.moe.shared_w1"] = matrix(layers, width, shared)
        specs["layers.moe.shared_w3"] = matrix(layers, width, shared)
        specs["layers.moe.shared_w2"] = matrix(layers, shared, width, gain=residual)
    if config.value_embeddings:
        specs["layers.self_attn.value_embed"] = Spec((layers, config.vocab_size, keys))
    if config.token_bias:
        specs["layers.token_bias"] = Spec((layers, config.vocab_size, width))
    if config.ngram_order > 1:
        specs["ngram_embed"] = Spec((config.ngram_order - 1, config.ngram_buckets, width))
    if not config.tie_word_embeddings:
        specs["lm_head"] = Spec((width, config.vocab_size), std=EMBEDDING_STD)
    return flatten(unflatten(specs))


def init_params(config: ModelConfig, generator: Generator, dtype: torch.dtype = torch.float32) -> Tree:
    """A nested dict of freshly drawn parameters on the generator's device; same generator state, same values."""

    def leaf(spec: Spec) -> Tensor:
        if spec.std is None:
            return torch.full(spec.shape, spec.fill, dtype=dtype, device=generator.device)
        drawn = torch.randn(spec.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return (drawn * spec.std).to(dtype)

    return unflatten({name: leaf(spec) for name, spec in param_specs(config).items()})


def count_params(config: ModelConfig) -> int:
    """Number of parameters of the model."""
    return sum(math.prod(spec.shape) for spec in param_specs(config).values())


def count_active_params(config: ModelConfig, experts_per_tok: float) -> float:
    """Parameters that one token uses when it visits `experts_per_tok` experts on average.

    A table that is only looked up, unlike an embedding that is the head, too, counts with the rows that a token reads.
    """
    shares = dict.fromkeys(("w1", "w2", "w3"), experts_per_tok / config.num_experts)
    shares |= {"ngram_embed": 1 / config.ngram_buckets}
    shares |= dict.fromkeys(("value_embed", "token_bias", "token_table"), 1 / config.vocab_size)
    sizes = {name: math.prod(spec.shape) for name, spec in param_specs(config).items()}
    return sum(size * shares.get(name.rpartition(".")[2], 1.0) for name, size in sizes.items())


def count_active_flops(config: ModelConfig, experts_per_tok: float, sequence_length: int) -> float:
    """Floating-point operations of one token's forward pass, mean over the places of a sequence.

    Two for every active weight of a matrix that is multiplied (a tied embedding as the head, hashed tokens no router),
    and in every layer 4 * heads * head_dim for each of the (sequence_length + 1) / 2 tokens that are attended to on
    average. Norms, rotations and activations are left out. A training step costs about three times as much.
    """
    idle = {"norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "router_bias"}
    idle |= {"token_table", "table_on", "value_embed", "token_bias", "ngram_embed"}
    idle |= set() if config.tie_word_embeddings else {"embed_tokens"}
    sizes: dict[str, float] = {name: math.prod(spec.shape) for name, spec in param_specs(config).items()}
    layers = config.num_hidden_layers
    sizes["layers.moe.router"] *= sum(config.has_router(layer) for layer in range(layers)) / layers
    used = {name: size for name, size in sizes.items() if name.rpartition(".")[2] not in idle}
    share = experts_per_tok / config.num_experts
    weights = sum(size * (share if name.endswith((".w1", ".w2", ".w3")) else 1) for name, size in used.items())
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * weights + 4 * heads * (sequence_length + 1) / 2


Shape = tuple[int, ...]
Node = tuple[tuple[str, ...], tuple[tuple[str, Shape], ...], int]  # path, shapes of its leaves, number of all entries
EXPERT_LEAVES = frozenset({"w1", "w2", "w3"})  # what may be spread over processes


@cache
def _nodes(config: ModelConfig, own_experts: int) -> tuple[Node, ...]:
    """The dicts of a tree of parameters, laid out once: they are asked for at every step."""
    by_path: dict[tuple[str, ...], dict[str, Shape]] = {}
    for name, spec in param_specs(config).items():
        *path, last = name.split(".")
        shape = (spec.shape[0], own_experts, *spec.shape[2:]) if last in EXPERT_LEAVES else spec.shape
        by_path.setdefault(tuple(path), {})[last] = shape
    inner = [path[:-1] for path in by_path if path]
    return tuple((path, tuple(leaves.items()), len(leaves) + inner.count(path)) for path, leaves in by_path.items())


def check_params(
    params: Mapping[str, Any], config: ModelConfig, runs: Sequence[int] = (), *, is_spread: bool = False
) -> None:
    """Refuse parameters that do not belong to the configuration; a few microseconds where they do.

    Args:
        runs: sizes of the axes in front of every leaf.
        is_spread: whether these may be some of the experts only, the others being elsewhere.

    Raises:
        ValueError: a leaf is missing, unknown or has another shape; the message names it.
    """
    runs, own_experts = tuple(runs), _count_experts(params, config) if is_spread else config.num_experts
    nodes = _nodes(config, own_experts)
    if not _fit(params, nodes, runs):
        _refuse(flatten(params), nodes, runs)


def _count_experts(params: Mapping[str, Any], config: ModelConfig) -> int:
    shape: Shape = getattr(params.get("layers", {}).get("moe", {}).get("w1"), "shape", ())
    return min(shape[-3], config.num_experts) if len(shape) > 3 else config.num_experts


def _fit(params: Mapping[str, Any], nodes: tuple[Node, ...], runs: Shape) -> bool:
    for path, leaves, count in nodes:
        node: Any = params
        for key in path:
            node = node.get(key, {})
        if len(node) != count:
            return False
        for name, shape in leaves:
            if getattr(node.get(name), "shape", None) != runs + shape:
                return False
    return True


def _refuse(leaves: Mapping[str, Any], nodes: tuple[Node, ...], runs: Shape) -> None:
    """Name the first leaf that does not fit."""
    shapes = {".".join((*path, name)): runs + shape for path, own, _ in nodes for name, shape in own}
    for name in (*shapes, *leaves):
        leaf, wanted = leaves.get(name), f"shape {shapes[name]}" if name in shapes else "no such leaf"
        came = tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
        if name not in leaves:
            raise ValueError(f"params.{name}: expected {wanted}, got no such leaf")
        if name not in shapes or not isinstance(leaf, Tensor) or tuple(leaf.shape) != shapes[name]:
            raise ValueError(f"params.{name}: expected {wanted}, got {came}")
