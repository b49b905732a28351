"""The first state of a run: random weights or those of a folder, a finished run's router, tables from the text."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.huggingface.pretrained import load_pretrained
from tiny_onn_func.params import param_specs
from tiny_onn_func.tree import ROUTER_LEAVES, flatten, partition, tree_map, unflatten
from training.data.corpus import Corpus
from training.data.hf_tokenizer import check_same_tokens
from training.data.token_table import balanced_table, token_counts
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.run.finished import open_writer
from training.run.settings import init_folder
from training.step.hyper_step import TrainState, init_state, state_of

# What may differ from the folder's: how many experts a token visits is no property of the weights.
FREE = (
    "num_experts_per_tok", "min_experts_per_tok", "max_experts_per_tok", "routing", "hash_key", "hash_weights",
    "hash_layers", "gate", "default_outputs",
)  # fmt: skip

TABLES = ("token_table", "table_on", "default_output")


def first_state(config: RunConfig, tokenizer: Tokenizer | None = None) -> TrainState:
    """Parameters in float32, optimizers without memory, step 0.

    Args:
        tokenizer: of the run, to be compared with that of the folder.

    Raises:
        UserError: the folder of `init` has other sizes, or another tokenizer, than the run.
        ValueError: it holds no Qwen3-MoE or model of ours, or a broken one.
    """
    if config.init is None:
        return init_state(config.model, torch.Generator().manual_seed(config.seed))
    if tokenizer is not None:
        check_same_tokens(tokenizer, init_folder(config.init), "init")
    params, pretrained = load_pretrained(init_folder(config.init))
    for field in fields(ModelConfig):
        wanted, came = getattr(pretrained, field.name), getattr(config.model, field.name)
        if field.name not in FREE and wanted != came:
            raise UserError(
                f"model.{field.name}: expected {wanted}, as in {config.init}, got {came}; leave it away to follow init"
            )
    flat = flatten(tree_map(lambda leaf: leaf.to(torch.float32), params))
    for name, spec in param_specs(config.model).items():  # how tokens are routed may differ, and the tables of it
        if name.rpartition(".")[2] in TABLES and name not in flat:
            flat[name] = torch.zeros(spec.shape)
    kept = {name: flat[name] for name in param_specs(config.model)}
    return state_of(unflatten(kept), config.model)


def with_router(state: TrainState, config: RunConfig, texts: Sequence[Corpus]) -> TrainState:
    """The first state of a run with the router that its settings ask for.

    Args:
        texts: training sides, of whose tokens a table gives every expert its share; read where there is an empty table.

    Raises:
        UserError: `router_init` has another router than the run's model; a table without a fixed K.
    """
    if config.router_init is not None:
        state = _transplanted(state, config, config.router_init)
    table = "layers.moe.token_table"
    flat = flatten(state.params)
    if config.model.hash_key != "table" or flat[table].any():
        return state
    counts = np.stack([token_counts(text, config.model.vocab_size) for text in texts]).sum(axis=0)
    try:
        flat[table] = balanced_table(counts, config.model).to(flat[table].dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
    return state._replace(params=unflatten(flat))


def _transplanted(state: TrainState, config: RunConfig, folder: str) -> TrainState:
    """The state with the router's leaves of a run, or of a folder of Qwen3-MoE; optimizers begin anew."""
    if not Path(folder).is_dir():
        raise UserError(f"router_init: expected the folder of a run or of a model, got {folder}")
    theirs = flatten(partition(open_writer(folder).params)[1])
    flat = flatten(state.params)
    for name in (name for name in flat if name.rpartition(".")[2] in ROUTER_LEAVES):
        if name in theirs and theirs[name].shape != flat[name].shape:
            ours, came = tuple(flat[name].shape), tuple(theirs[name].shape)
            raise UserError(f"router_init: expected {name} of shape {ours}, as this model's, got {came} in {folder}")
        if name in theirs:
            flat[name] = theirs[name].to(torch.float32)
    return state_of(unflatten(flat), config.model)
