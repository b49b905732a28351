"""Checkpoints: a tree of tensors as safetensors plus JSON, whole or not there at all, bit for bit the same when loaded.

    RUN/checkpoints/step_000500/   a checkpoint; `checkpoint_files.py` says what is in it and how it is written

A run folder stands for its newest checkpoint. One that is damaged is named on the error stream and passed over.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, tree_map, unflatten, walk
from training.errors import UserError
from training.storage.checkpoint_files import (
    ALONE,
    MEND,
    META,
    STATE,
    Damaged,
    publish_step,
    read_meta,
    read_tensors,
    remove_steps,
    steps_in,
)
from training.terminal import LOG


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums are right."""

    folder: Path
    step: int
    model: dict[str, Any]  # sizes
    tokenizer: str  # fingerprint
    settings: dict[str, Any]  # dotted names of what decides the numbers of a run; empty where nobody gave them


def save_checkpoint(
    folder: str | Path,
    state: Any,
    config_dict: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
    tokenizer: str = "bytes",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `state` as the checkpoint of its step, then remove older ones beyond the newest `keep`.

    Args:
        folder: the run folder.
        state: nested dicts, NamedTuples or sequences of tensors, with a leaf `step` at the top.
        config_dict: the model's sizes, `dataclasses.asdict(model_config)`.
        keep: checkpoints to leave, this one included; later steps and folders of other names are never touched.
        best: a step whose checkpoint stays, too.
        tokenizer: fingerprint of the tokenizer that the parameters go with.
        settings: what a run that goes on from here must have the same.

    Returns:
        The new folder. When anything fails, everything that was there before is still there and nothing else is.

    Raises:
        UserError: the disk refuses.
        ValueError: a leaf is no tensor, two leaves share a name, no leaf is called `step`, keep < 1.
    """
    tensors = named_tensors(state)
    if "step" not in tensors or keep < 1:
        raise ValueError(f"save_checkpoint: expected a leaf `step` and keep >= 1, got {[*tensors][:3]} and {keep}")
    step, home = int(tensors["step"]), Path(folder, "checkpoints")
    about = {"model": dict(config_dict), "tokenizer": tokenizer, "settings": dict(settings or {})}
    try:
        target = publish_step(home, step, tensors, about)
        older = [path for at, path in steps_in(home) if at < step and at != best]
        remove_steps(older[: -(keep - 1) or None])
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        place = home / f"step_{step:06d}"
        raise UserError(f"{place}: the disk refused it: {reason}; free space or choose another --out") from error
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run folder; None when there is none. Unfinished ones do not count."""
    steps = steps_in(Path(folder, "checkpoints"))
    return steps[-1][1] if steps else None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `step_NNNNNN` folder, or the newest whole one of a run folder; each damaged newer one is named.

    Raises:
        UserError: no checkpoint, none that is whole, or one of another format.
    """
    location = Path(path)
    if (location / META).exists() or (location / STATE).exists():
        return _opened(location)
    folders = [folder for _, folder in reversed(steps_in(location / "checkpoints"))]
    if not folders:
        raise UserError(f"{path}: expected a run folder with checkpoints/step_NNNNNN in it, or one of those; got none")
    for folder, before in pairwise(folders):
        try:
            return _opened(folder)
        except Damaged as error:
            LOG.warning("warning: %s; using %s", error, before.name)
    try:
        return _opened(folders[-1])
    except Damaged as error:
        raise Damaged(str(error).replace(MEND, ALONE)) from None


def load_checkpoint(path: str | Path, like: Any = None) -> Any:
    """Load the state of a checkpoint, bit for bit.

    Args:
        path: a `step_NNNNNN` folder, or a run folder, which means its newest checkpoint.
        like: a state of the same structure, shapes and dtypes, as `init_state` makes it. The result has its types
            and devices; without it the result is nested dicts on the CPU.

    Raises:
        UserError: a file is missing or damaged, of an unknown format, or holds another model than `like`.
    """
    return load_state(open_checkpoint(path), like)


def load_state(checkpoint: Checkpoint, like: Any = None) -> Any:
    """The state in an opened checkpoint; as `load_checkpoint`."""
    flat = read_tensors(checkpoint.folder, "")
    return unflatten(flat) if like is None else _restore(checkpoint.folder / STATE, flat, like)


def load_params(path: str | Path) -> tuple[Tree, ModelConfig]:
    """Load the parameters, on the CPU, and the model's sizes of a checkpoint or of a run folder's newest one.

    Raises:
        UserError: as `load_checkpoint`, or the sizes in meta.json are none of a model.
    """
    return params_of(open_checkpoint(path))


def params_of(checkpoint: Checkpoint) -> tuple[Tree, ModelConfig]:
    """The parameters and sizes in an opened checkpoint; as `load_params`."""
    config = sizes_of(checkpoint)
    return unflatten(read_tensors(checkpoint.folder, "params."))["params"], config


def sizes_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model's sizes in an opened checkpoint.

    Raises:
        UserError: they are none of a model.
    """
    try:
        return ModelConfig(**checkpoint.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder / META}: expected the sizes of a model, got: {error}; {MEND}") from None


def checkpoint_tokenizer(path: str | Path) -> str:
    """Fingerprint of the tokenizer that belongs to a checkpoint, or to a run folder's newest one.

    Raises:
        UserError: as `load_checkpoint`.
    """
    return open_checkpoint(path).tokenizer


def _opened(folder: Path) -> Checkpoint:
    return checkpoint_of(folder, read_meta(folder))


def checkpoint_of(folder: Path, meta: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a checked meta.json describes."""
    settings = meta.get("settings")
    return Checkpoint(
        folder, meta["step"], meta["model"], str(meta.get("tokenizer", "bytes")),
        settings if isinstance(settings, dict) else {},
    )  # fmt: skip


def named_tensors(state: Any) -> dict[str, Tensor]:
    """Dotted name -> leaf on the CPU, contiguous and with memory of its own, as safetensors wants it.

    Leaves that are so already are not copied. What this returns can be saved in another thread: there no torch
    operation is left to do, whose second pool of threads would slow down every step.

    Raises:
        ValueError: a leaf is no tensor, or two leaves share a name.
    """
    tensors: dict[str, Tensor] = {}
    memories = set()
    for name, leaf in walk(state):
        if not isinstance(leaf, Tensor) or name in tensors:
            raise ValueError(f"save_checkpoint: expected one tensor called {name}, got {type(leaf).__name__}")
        tensor = leaf.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in memories:
            tensor = tensor.clone()
        memories.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _restore(path: Path, flat: dict[str, Tensor], like: Any) -> Any:
    """The leaves in the structure of `like`."""
    wanted = dict(walk(like))
    advice = "use the sizes in the run's own config.yaml"
    for name in sorted(wanted.keys() ^ flat.keys()):
        states = ("a tensor", "none") if name in wanted else ("no tensor", "one")
        raise UserError(f"{path}: expected {states[0]} called {name}, got {states[1]}; {advice}")
    for name, leaf in wanted.items():
        came = flat[name]
        if (came.shape, came.dtype) != (leaf.shape, leaf.dtype):
            shapes = f"{tuple(leaf.shape)} {leaf.dtype}, got {tuple(came.shape)} {came.dtype}"
            raise UserError(f"{path}: {name}: expected {shapes}; {advice}")
    values = iter([flat[name].to(leaf.device) for name, leaf in wanted.items()])
    return tree_map(lambda _: next(values), like)
