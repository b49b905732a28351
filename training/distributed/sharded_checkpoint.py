"""Checkpoints of states that no process has whole: torch.distributed.checkpoint (DCP), each process writes its ranges.

    RUN/sharded/step_000500/*.distcp     ranges of six vectors: parameters and both moments of `flat_params`
    RUN/sharded/step_000500/.metadata    which range stands where, a pickle
    RUN/sharded/step_000500/meta.json    format, step, sizes, settings, SHA-256 of every other file

Ranges of vectors have no memory of how many processes wrote them: any number, one included, can go on.

Only from folders that you trust: unpickling can run code. What `.metadata` names is looked at before torch reads it,
and anything but the classes of DCP is refused, but a folder from a stranger is not what this format is for; what is
given to others is the safetensors folder that `tiny-onn export` writes.
"""

import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tiny_onn_func.config import ModelConfig
from training.distributed.collectives import Group
from training.distributed.layout import Layout
from training.distributed.sharded_state import as_stored, empty_state, from_stored
from training.errors import UserError
from training.step.hyper_step import TrainState
from training.storage.atomic import flush, make_folder
from training.storage.checkpoint import Checkpoint, save_checkpoint
from training.storage.checkpoint_files import DRAFT, META, clean, digest, remove_steps, sha256, steps_in, version
from training.storage.lock import locked
from training.terminal import LOG

FOLDER, INDEX, FORMAT = "sharded", ".metadata", 1
TRUST = "its .metadata is a pickle, which can run code: only from folders that you trust"
NAMED = {  # what an index is made of; whole names, as a dot would reach from any module into others
    "pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size", "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                     "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
}  # fmt: skip


def save_sharded(
    home: Path, state: TrainState, config: ModelConfig, layout: Layout, about: Mapping[str, Any], keep: int,
    best: int | None,
) -> None:  # fmt: skip
    """Write `home`/sharded/step_NNNNNN, whole or not at all; all processes must call. Older ones are then removed.

    Args:
        about: keywords of `save_checkpoint`: sizes, tokenizer, settings.

    Raises:
        UserError: the disk refuses.
    """
    dcp = _library()
    step, folder = int(state.step), home / FOLDER
    draft, target = folder / f"{DRAFT}step_{step:06d}", folder / f"step_{step:06d}"
    if layout.world.rank == 0:
        make_folder(folder)
        clean(folder)
        draft.mkdir()
    layout.world.barrier()
    try:
        dcp.save(as_stored(state, config, layout), checkpoint_id=draft)
        if layout.world.rank == 0:
            _publish(draft, target, step, about)
            older = [path for at, path in steps_in(folder) if at < step and at != best]
            remove_steps(older[: -(keep - 1) or None])
    except (OSError, dcp.CheckpointException) as error:
        raise UserError(f"{target}: the disk refused it: {error}; free space or choose another --out") from error
    finally:
        if layout.world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    layout.world.barrier()


def open_sharded(folder: Path) -> Checkpoint:
    """Open a sharded checkpoint after a check of every file.

    Raises:
        UserError: a file is missing or not what was written, or `.metadata` names what a checkpoint has no use for.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        files = meta["files"]
        fine = meta["format"] == FORMAT and meta.pop("checksum") == digest(meta)
        fine = fine and all(sha256(folder / name) == wanted for name, wanted in files.items())
        if not fine or INDEX not in files:
            raise ValueError("other checksums")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: expected a whole sharded checkpoint, got: {error}; remove it to go on from the one before"
        ) from None
    _check_index(folder / INDEX)
    return Checkpoint(folder, meta["step"], meta["model"], meta["tokenizer"], meta["settings"])


def is_sharded(checkpoint: Checkpoint) -> bool:
    """True if the checkpoint is a sharded one."""
    return (checkpoint.folder / INDEX).exists()


def load_sharded(checkpoint: Checkpoint, config: ModelConfig, layout: Layout) -> TrainState:
    """Load this rank's part of the state; all ranks must call.

    Raises:
        UserError: it holds another model.
    """
    dcp, like = _library(), empty_state(config, layout)
    stored = as_stored(like, config, layout)
    try:
        with warnings.catch_warnings():  # that one process alone reads is meant so
            warnings.simplefilter("ignore")
            dcp.load(stored, checkpoint_id=checkpoint.folder, no_dist=layout.world.size == 1)
    except (dcp.CheckpointException, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{checkpoint.folder}: expected the model of config.yaml, got: {reason}") from None
    return from_stored(stored, like, config, layout)


def gather_sharded(run: str | Path) -> Path:
    """Write a run's newest sharded checkpoint as a whole one, beside its others; returns the new folder.

    Raises:
        UserError: there is none, it is not whole, the run is in use, the disk refuses.
    """
    home = Path(run)
    checkpoints = steps_in(home / FOLDER)
    if not checkpoints:
        raise UserError(f"{home}: expected {FOLDER}/step_NNNNNN in it, got none; its checkpoints are whole already")
    with locked(home):
        checkpoint = open_sharded(checkpoints[-1][1])
        alone = Layout(Group(), Group(), Group())
        state = load_sharded(checkpoint, ModelConfig(**checkpoint.model), alone)
        return save_checkpoint(
            home, state, checkpoint.model, keep=sys.maxsize, tokenizer=checkpoint.tokenizer,
            settings=checkpoint.settings,
        )  # fmt: skip


def check_whole(home: Path) -> None:
    """Warn if a run's newest checkpoint is sharded, which only `gather_sharded` makes readable for all.

    Raises:
        UserError: there is no other one.
    """
    sharded, whole = (steps_in(home / kind) for kind in (FOLDER, "checkpoints"))
    if not sharded or (whole and whole[-1][0] >= sharded[-1][0]):
        return
    mend = f"make it whole with `tiny-onn export {home} --from-sharded --out DIR`; {TRUST}"
    if not whole:
        raise UserError(f"{home}: expected a whole checkpoint, got {FOLDER}/{sharded[-1][1].name} alone; {mend}")
    LOG.warning("warning: %s/%s is newer than %s; %s", FOLDER, sharded[-1][1].name, whole[-1][1].name, mend)


def _library() -> Any:
    """Import torch.distributed.checkpoint, which takes four seconds, for sharded runs only."""
    from torch.distributed import checkpoint

    return checkpoint


# Files ----------------------------------------------------------------------------------------------------------------


def _publish(draft: Path, target: Path, step: int, about: Mapping[str, Any]) -> None:
    files = {path.name: sha256(path) for path in sorted(draft.iterdir())}
    said = {"model": about["config_dict"], "tokenizer": about["tokenizer"], "settings": about["settings"]}
    meta = {"format": FORMAT, "step": step, **said, "files": files, "version": version()}
    meta["checksum"] = digest(json.loads(json.dumps(meta)))
    (draft / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    flush(target.parent)


class _Looking(pickle.Unpickler):
    """Unpickler that admits only the classes of a checkpoint's index."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (is_dtype or f"{module}.{name}" in NAMED):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_index(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _Looking(file).load()
    except Exception as error:  # whatever a broken pickle raises
        raise UserError(f"{path}: expected the index of a sharded checkpoint, got: {error}; {TRUST}") from None
