"""A finished run, opened from its folder for scoring and for generating text."""

from pathlib import Path
from typing import NamedTuple

import torch

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.huggingface.config import CONFIG
from tiny_onn_func.huggingface.pretrained import load_pretrained
from tiny_onn_func.params import check_params
from tiny_onn_func.tree import Tree, flatten, tree_map
from training.data.hf_tokenizer import open_tokenizer, run_tokenizer
from training.data.tokenizer import BYTES, FILE, Tokenizer, check_vocab
from training.distributed.sharded_checkpoint import check_whole
from training.errors import UserError
from training.run.config import RunConfig
from training.run.settings import load_settings
from training.step.hyper_params import HyperParams
from training.storage.checkpoint import open_checkpoint, params_of
from training.storage.checkpoint_files import STEP_FOLDER

PARAMETER_DTYPES = (torch.float32, torch.float64)  # what a run keeps them in


class FinishedRun(NamedTuple):
    """Settings, parameters and tokenizer of a run folder."""

    config: RunConfig
    params: Tree
    tokenizer: Tokenizer


def open_run(folder: str | Path) -> FinishedRun:
    """The settings and the newest parameters of a run folder, or those of a checkpoint in one.

    Args:
        folder: RUN, or RUN/checkpoints/step_NNNNNN.

    Raises:
        UserError: there is no run in the folder, or no checkpoint in it, or another tokenizer than it trained with.
    """
    path = Path(folder)
    home = path.parents[1] if STEP_FOLDER.fullmatch(path.name) and len(path.parents) > 1 else path
    settings = home / "config.yaml"
    if not settings.is_file():
        raise no_run(folder)
    config = load_settings(str(settings))
    if path == home:
        check_whole(home)
    checkpoint = open_checkpoint(path)
    params, model = params_of(checkpoint)
    if model != config.model:
        raise UserError(f"{settings}: expected the sizes of the checkpoint, got others; restore the file as it was")
    _check_leaves(params, config, checkpoint.folder)
    tokenizer = run_tokenizer(home, config.tokenizer, checkpoint.tokenizer)
    return FinishedRun(config, params, tokenizer)


def no_run(folder: str | Path) -> UserError:
    """Error for a folder that is none of a run; a study's is told where its runs are."""
    is_study = Path(folder, "study.yaml").exists()
    mend = f"the runs of this study are in {Path(folder, 'runs')}" if is_study else "`tiny-onn train` makes one"
    return UserError(f"{folder}: expected a run folder with a config.yaml, found none; {mend}")


class Writer(NamedTuple):
    """Model, tokenizer and defaults for generating text."""

    model: ModelConfig
    params: Tree
    tokenizer: Tokenizer
    context: int | None  # tokens that it saw together in training
    surprise_budget: float
    prompt: str  # of the run; "" is the beginning of a document


def open_writer(folder: str | Path) -> Writer:
    """Open a run, or a Qwen3-MoE folder of surgery, `export`, `save_pretrained` or Hugging Face's tools.

    A folder is computed in float32; without a tokenizer.json its tokens are bytes, as for `init`.

    Raises:
        UserError, ValueError: neither of them, or a broken one.
    """
    if Path(folder, "config.yaml").exists() or not Path(folder, CONFIG).exists():
        config, params, tokenizer = open_run(folder)
        return Writer(
            config.model, params, tokenizer, config.sequence_length, float(config.hyper.pi_alpha), config.prompt or ""
        )
    params, model = load_pretrained(folder)
    tokenizer = open_tokenizer(folder) if Path(folder, FILE).is_file() else BYTES
    check_vocab(tokenizer, model.vocab_size)
    return Writer(
        model, tree_map(lambda leaf: leaf.float(), params), tokenizer, None, float(HyperParams().pi_alpha), ""
    )


def _check_leaves(params: Tree, config: RunConfig, folder: Path) -> None:
    """Refuse a checkpoint with right checksums whose tensors are not those of its model."""
    try:
        check_params(params, config.model)
        for name, leaf in flatten(params).items():
            if leaf.dtype not in PARAMETER_DTYPES:
                raise ValueError(f"params.{name}: expected a floating point tensor, got {leaf.dtype}")
    except ValueError as error:
        raise UserError(f"{folder}: {error}; use another checkpoint of the run") from None
