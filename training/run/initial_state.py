"""The first state of a run: random weights, or those of a folder."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.huggingface.config import MOE, OWN, read_config
from tiny_onn_func.huggingface.pretrained import load_pretrained
from tiny_onn_func.params import param_specs
from tiny_onn_func.tree import flatten, tree_map, unflatten
from training.data.hf_tokenizer import check_same_tokens
from training.data.tokenizer import FILE, Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.step.hyper_step import TrainState, init_state, state_of

# What may differ from the folder's: how many experts a token visits is no property of the weights.
FREE = (
    "num_experts_per_tok", "min_experts_per_tok", "max_experts_per_tok", "routing", "hash_key", "hash_weights",
    "hash_layers", "gate",
)  # fmt: skip

TABLES = ("token_table", "table_on")


def sizes_follow(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; where they name `init`, sizes and tokenizer of its folder join them, unless given.

    A folder without a tokenizer.json is taken to be of the run's tokenizer, bytes by default.
    """
    keys = {f"model.{field.name}": field.name for field in fields(ModelConfig)}
    if not settings.get("init") or keys.keys() <= settings.keys():  # a run's own settings spell all of them
        return {**settings}
    folder = _folder(settings["init"])
    config, _ = read_config(folder, (MOE, OWN))
    sizes = {key: getattr(config, name) for key, name in keys.items()}
    return sizes | ({"tokenizer": settings["init"]} if (folder / FILE).is_file() else {}) | {**settings}


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
        check_same_tokens(tokenizer, _folder(config.init), "init")
    params, pretrained = load_pretrained(_folder(config.init))
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


def _folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise UserError(f"init: expected a folder with a model, got {name}; `tiny-onn surgery` makes one")
    return Path(name)
