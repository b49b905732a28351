"""Checkpoints of states that no process has whole: torch.distributed.checkpoint (DCP), each process writes its ranges.

    RUN/sharded/step_000500/shard-*.safetensors   ranges of six vectors: parameters and both moments of `flat_params`,
                                                  and the router's tensors, each with its place in the whole
    RUN/sharded/step_000500/meta.json             format, step, sizes, settings, SHA-256 of every shard

Ranges of vectors have no memory of how many processes wrote them: any number, one included, can go on.
"""

import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tiny_onn_func.config import ModelConfig
from training.distributed.collectives import Group
from training.distributed.layout import Layout
from training.distributed.sharded_state import as_stored, empty_state, from_stored
from training.errors import UserError
from training.step.hyper_step import TrainState
from training.step.rules import LEAST_SURPRISE, Rule
from training.storage.atomic import make_folder
from training.storage.checkpoint import Checkpoint, checkpoint_of, save_checkpoint, sizes_of
from training.storage.checkpoint_files import (
    DRAFT,
    MEND,
    STATE,
    Damaged,
    clean,
    publish,
    read_meta,
    remove_steps,
    sha256,
    steps_in,
    write_meta,
)
from training.storage.lock import locked
from training.terminal import LOG

FOLDER, FORMAT, SHARDS = "sharded", 2, "*.safetensors"
PICKLE = ".metadata"  # the index of format 1
SIZES = "use the sizes in the run's own config.yaml"


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
        writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
        dcp.save(as_stored(state, config, layout), storage_writer=writer)
        if layout.world.rank == 0:
            hashes = {path.name: sha256(path) for path in sorted(draft.iterdir())}
            said = {"model": about["config_dict"], "tokenizer": about["tokenizer"], "settings": about["settings"]}
            write_meta(draft, {"format": FORMAT, "step": step, **said, "sha256": hashes})
            publish(draft, target)
            older = [path for at, path in steps_in(folder) if at < step and at != best]
            remove_steps(older[: -(keep - 1) or None])
    except (OSError, dcp.CheckpointException) as error:
        reason = _reason(error)
        raise UserError(f"{target}: the disk refused it: {reason}; free space or choose another --out") from error
    finally:
        if layout.world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    layout.world.barrier()


def open_sharded(folder: Path) -> Checkpoint:
    """Open a sharded checkpoint after a check of every file.

    Raises:
        Damaged: a file is missing, not what was written, or a shard of another checkpoint.
        UserError: another version of the program wrote it.
    """
    if (folder / PICKLE).exists():
        raise UserError(
            f"{folder}: expected shards in safetensors, got {PICKLE}, a pickle of an older version, never opened; "
            "with that version run `tiny-onn export RUN --from-sharded --out DIR`, then --resume with this one"
        )
    return checkpoint_of(folder, read_meta(folder, [path.name for path in folder.glob(SHARDS)], FORMAT))


def is_sharded(checkpoint: Checkpoint) -> bool:
    """True if the checkpoint is a sharded one."""
    return not (checkpoint.folder / STATE).exists()


def load_sharded(
    checkpoint: Checkpoint, config: ModelConfig, layout: Layout, rule: Rule = LEAST_SURPRISE
) -> TrainState:
    """Load this rank's part of the state; all ranks must call.

    Raises:
        Damaged: the shards are no safetensors, or lack a part of a tensor.
        UserError: it holds another model.
    """
    dcp, like = _library(), empty_state(config, layout, rule)
    stored = as_stored(like, config, layout)
    _check_shards(checkpoint.folder, stored)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint.folder))
    try:
        with warnings.catch_warnings():  # that one process alone reads is meant so
            warnings.simplefilter("ignore")
            dcp.load(stored, storage_reader=reader, no_dist=layout.world.size == 1)
    except (dcp.CheckpointException, ValueError) as error:
        raise Damaged(f"{checkpoint.folder}: expected shards, got: {_reason(error)}; {MEND}") from None
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
        state = load_sharded(checkpoint, sizes_of(checkpoint), alone)
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
    mend = f"make it whole with `tiny-onn export {home} --from-sharded --out DIR`"
    if not whole:
        raise UserError(f"{home}: expected a whole checkpoint, got {FOLDER}/{sharded[-1][1].name} alone; {mend}")
    LOG.warning("warning: %s/%s is newer than %s; %s", FOLDER, sharded[-1][1].name, whole[-1][1].name, mend)


def _library() -> Any:
    """Import torch.distributed.checkpoint, which takes four seconds, for sharded runs only."""
    from torch.distributed import checkpoint

    return checkpoint


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; DCP puts the tracebacks of all ranks into one exception."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return str(first).strip().partition("\n")[0][:160] or type(first).__name__


# Shards ---------------------------------------------------------------------------------------------------------------


def _check_shards(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """Refuse shards that are not the tensors of this model, whole and nothing twice.

    DCP would convert another dtype, and leave unwritten what no shard holds.
    """
    try:
        there = _library().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a broken header raises
        raise Damaged(f"{folder}: expected safetensors with places of ranges, got: {_reason(error)}; {MEND}") from None
    for name in sorted(wanted.keys() ^ there.keys()):
        states = ("a tensor", "none") if name in wanted else ("no tensor", "one")
        raise UserError(f"{folder}: expected {states[0]} called {name}, got {states[1]}; {SIZES}")
    for name, tensor in wanted.items():
        shape, dtype = tuple(there[name].size), there[name].properties.dtype
        if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
            wants = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"{folder}: {name}: expected {wants}, got {shape} {dtype}; {SIZES}")
        if not _tiles([(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in there[name].chunks], shape):
            raise Damaged(f"{folder}: {name}: expected every entry once, got a gap or one twice; {MEND}")


def _tiles(chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """True if the chunks (offsets, sizes) make a tensor: one that is all of it, or ranges of a vector."""
    if len(shape) != 1:
        return chunks == [((0,) * len(shape), shape)]
    end = 0
    for (start,), (size,) in sorted(chunks):
        if start != end or (size == 0 and start < shape[0]):  # an empty one would hide the one that begins there
            return False
        end += size
    return end == shape[0]
