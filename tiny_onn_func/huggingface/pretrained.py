"""Hugging Face Qwen3-MoE folders <-> (params, config). No code and no pickle of a checkpoint is ever opened."""

from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.huggingface.config import MOE, OWN, OWN_SETTINGS, config_values, read_config, shown
from tiny_onn_func.huggingface.folder import DTYPES, Stored, read_headers, read_tensors, write_folder
from tiny_onn_func.huggingface.layout import EMBEDDING, HEAD, Spelling, layout
from tiny_onn_func.params import check_params, param_specs
from tiny_onn_func.tree import ROUTER_LEAVES, Tree, flatten, unflatten

BIAS = "layers.moe.router_bias"


def load_pretrained(folder: str | Path) -> tuple[Tree, ModelConfig]:
    """The parameters, on the CPU, and the sizes in a Qwen3-MoE folder, Hugging Face's or one of `save_pretrained`.

    Both spellings of config.json, a single file or shards with an index, a tensor an expert or one for all, any of
    float32, bfloat16, float16 and float64; a leaf has the widest dtype among its tensors. All headers are checked
    against the configuration before memory for any tensor is asked for.

    Raises:
        ValueError: what is there is broken, hostile, of another architecture or has an option that this decoder does
            not compute; one line that names the file and the key or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{shown(folder)}: expected a folder with a model, got {'a file' if folder.exists() else 'nothing'}"
        )
    config, values = read_config(folder, (MOE, OWN))
    stored = read_headers(folder)
    bias = values["model_type"] == OWN
    spelling: Spelling = "fused" if "model.layers.0.mlp.experts.gate_up_proj" in stored else "experts"
    dtypes = check_headers(folder, stored, config, spelling, bias=bias)
    try:
        flat = {name: torch.zeros(spec.shape, dtype=dtypes[name]) for name, spec in param_specs(config).items()}
    except RuntimeError as error:
        raise ValueError(f"{shown(folder)}: expected memory for its tensors, got: {shown(error)}") from None
    for group in layout(config, spelling, bias=bias):
        pieces = {piece.name: piece for piece in group}
        for name, tensor in read_tensors(stored, pieces):
            pieces[name].put(flat, tensor)
    return unflatten(flat), config


def save_pretrained(params: Mapping[str, Any], config: ModelConfig, folder: str | Path) -> None:
    """Write a model as a Qwen3-MoE folder (config.json, model.safetensors), whole or not at all; it loads bitwise.

    What Qwen3-MoE cannot express, dynamic K and a selection bias, is written as model type `tiny_onn`: the same
    layout, which `load_pretrained` reads and other programs refuse instead of computing something else.

    Raises:
        ValueError: parameters that do not belong to the configuration, a folder that holds anything else, a disk that
            refuses.
    """
    save_model(params, config, folder)


def save_model(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """`save_pretrained` with further keys of config.json and files beside the weights; the absolute path written."""
    check_params(dict(params), config)
    flat = {name: leaf.detach().cpu() for name, leaf in flatten(params).items()}
    kind = MOE if inexpressible(params, config) is None else OWN
    for name, leaf in flat.items():
        if leaf.dtype not in DTYPES.values():
            raise ValueError(f"params.{name}: expected a floating point tensor of 16 bits or more, got {leaf.dtype}")
    dtype = str(flat["embed_tokens"].dtype).removeprefix("torch.")
    groups = _groups(flat, config, bias=kind == OWN)
    return write_folder(folder, config_values(config, kind, dtype, extra), groups, files=files)


def inexpressible(params: Mapping[str, Any], config: ModelConfig) -> str | None:
    """Name the part of a model that Qwen3-MoE cannot express, in a phrase; None if it can express all of it."""
    bias = flatten(params)[BIAS]
    if bool(((bias != 0) | bias.signbit()).any()):  # a negative zero has bits, too
        return "a selection bias of the router (loss-free balancing)"
    if config.routing != "router":
        return f"routing by {config.routing} (model.routing)"
    for name, off in OWN_SETTINGS.items():
        if getattr(config, name) != off:
            return f"model.{name} {getattr(config, name)}"
    return "dynamic K (num_experts_per_tok -1)" if config.num_experts_per_tok == DYNAMIC_K else None


def check_headers(
    folder: Path, stored: Mapping[str, Stored], config: ModelConfig, spelling: Spelling, *, bias: bool = False
) -> dict[str, torch.dtype]:
    """Leaf -> its dtype, when a folder has exactly the tensors of the configuration.

    All leaves but the router's share a dtype, the widest there is: the decoder multiplies them with each other.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape; one line that names file and tensor.
    """
    specs, unknown = param_specs(config), {*stored}
    dtypes: dict[str, set[torch.dtype]] = {}
    for piece in (piece for group in layout(config, spelling, bias=bias) for piece in group):
        shape = piece.shape(specs)
        if piece.name not in stored:
            raise ValueError(f"{shown(folder)}: expected the tensor {piece.name} of shape {shape}, got none")
        file, came, dtype = stored[piece.name]
        if came != shape:
            raise ValueError(f"{shown(file)}: {piece.name}: expected shape {shape}, got {shown(list(came))}")
        unknown.discard(piece.name)
        for leaf in piece.leaves:
            dtypes.setdefault(leaf, set()).add(DTYPES[dtype])
    if config.tie_word_embeddings and HEAD in unknown:
        _check_tied(stored)
        unknown.discard(HEAD)
    for name in sorted(unknown):
        raise ValueError(
            f"{shown(stored[name].file)}: expected no tensor {shown(name)}, got one of shape {stored[name].shape}"
        )
    return _leaf_dtypes(dtypes, specs)


def _check_tied(stored: Mapping[str, Stored]) -> None:
    """A tied model may store its head again, as long as it is the embedding."""
    same = stored[HEAD].shape == stored[EMBEDDING].shape
    if not same or not torch.equal(*(tensor for _, tensor in read_tensors(stored, (EMBEDDING, HEAD)))):
        raise ValueError(
            f"{shown(stored[HEAD].file)}: {HEAD}: expected the embedding (tie_word_embeddings), got another"
        )


def _leaf_dtypes(by_leaf: Mapping[str, set[torch.dtype]], specs: Mapping[str, Any]) -> dict[str, torch.dtype]:
    def router(leaf: str) -> bool:
        return leaf.rsplit(".", 1)[-1] in ROUTER_LEAVES

    widest = reduce(torch.promote_types, {d for leaf, dtypes in by_leaf.items() if not router(leaf) for d in dtypes})
    own = {leaf: reduce(torch.promote_types, dtypes) for leaf, dtypes in by_leaf.items() if router(leaf)}
    own.setdefault("layers.moe.router", widest)  # of a dense model
    own.setdefault(BIAS, own["layers.moe.router"])
    return {leaf: own[leaf] if router(leaf) else widest for leaf in specs}


def _groups(flat: Mapping[str, Tensor], config: ModelConfig, *, bias: bool) -> Iterator[dict[str, Tensor]]:
    for group in layout(config, "experts", bias=bias):
        yield {piece.name: piece.take(flat) for piece in group}
