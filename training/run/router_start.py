"""The router before the first step: that of a finished run, and tables filled from the text."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tiny_onn_func.tree import ROUTER_LEAVES, flatten, partition, unflatten
from training.data.corpus import Corpus
from training.data.counts import token_counts
from training.errors import UserError
from training.run.config import RunConfig
from training.run.finished import open_writer
from training.step.hyper_step import TrainState, state_of
from training.step.token_table import balanced_table


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
    counts = sum(token_counts(text, config.model.vocab_size) for text in texts)
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
