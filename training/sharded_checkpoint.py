"""Checkpoints of states that no process has whole: torch.distributed.checkpoint (DCP), each process writes its ranges.

    RUN/sharded/step_000500/*.distcp     ranges of six vectors: parameters and both moments of `training.shards`
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
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, flatten, merge, partition, tree_map, unflatten
from training.checkpoint import Checkpoint
from training.checkpoint_files import DRAFT, META, clean, digest, remove_steps, sha256, steps_in, version
from training.durable import flush, make_folder
from training.errors import UserError
from training.hyper_step import TrainState, init_state
from training.optim import AdamWState
from training.parallel_step import Layout, gathered, shares
from training.shards import Vectors, fast_shapes, from_vectors, joined_shares, named_shares, to_vectors

FOLDER, INDEX, FORMAT = "sharded", ".metadata", 1
TRUST = "its .metadata is a pickle, which can run code: only from folders that you trust"
PLAIN = {
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "pathlib",
}  # fmt: skip
NAMED = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch", "device")}


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
    layout.world.wait_for_all()
    try:
        dcp.save(_as_stored(state, config, layout), checkpoint_id=draft)
        if layout.world.rank == 0:
            _publish(draft, target, step, about)
            older = [path for at, path in steps_in(folder) if at < step and at != best]
            remove_steps(older[: -(keep - 1) or None])
    except (OSError, dcp.CheckpointException) as error:
        raise UserError(f"{target}: the disk refused it: {error}; free space or choose another --out") from error
    finally:
        if layout.world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    layout.world.wait_for_all()


def open_sharded(folder: Path) -> Checkpoint:
    """What a sharded checkpoint holds, after a check of every file.

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
    """Whether it is one of this file's."""
    return (checkpoint.folder / INDEX).exists()


def load_sharded(checkpoint: Checkpoint, config: ModelConfig, layout: Layout) -> TrainState:
    """This process's part of the state; all processes must call.

    Raises:
        UserError: it holds another model.
    """
    dcp, like = _library(), _empty_state(config, layout)
    stored = _as_stored(like, config, layout)
    try:
        with warnings.catch_warnings():  # that one process alone reads is meant so
            warnings.simplefilter("ignore")
            dcp.load(stored, checkpoint_id=checkpoint.folder, no_dist=layout.world.size == 1)
    except (dcp.CheckpointException, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{checkpoint.folder}: expected the model of config.yaml, got: {reason}") from None
    return _from_stored(stored, like, config, layout)


# The six vectors ------------------------------------------------------------------------------------------------------


def _as_stored(state: TrainState, config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Dotted name -> ranges of vectors, and whole tensors of what is small."""
    fast, router = partition(state.params)
    stored: dict[str, Any] = {"step": state.step, "updates": state.expert_opt.updates}
    stored |= {f"router.{name}": leaf for name, leaf in flatten(router).items()}
    for name, leaf in flatten(state.router_opt._asdict()).items():
        stored[f"router_opt.{name}"] = leaf
    vectors = to_vectors(fast, config)
    where = shares(vectors, layout)

    def ranges(whole: Vectors) -> Vectors:
        return Vectors(*(vector[part] for vector, part in zip(whole, where, strict=True)))

    for name, moment in (("mu", state.expert_opt.mu), ("nu", state.expert_opt.nu)):
        own = joined_shares(moment) if layout.shard_optimizer else ranges(to_vectors(moment, config))
        stored |= _spread(name, own, vectors, layout)
    return stored | _spread("params", ranges(vectors), vectors, layout)


def _spread(name: str, mine: Vectors, own: Vectors, layout: Layout) -> dict[str, Tensor]:
    """This process's ranges as parts of tensors that are spread over all; plain ones where there is one process."""
    if layout.world.size == 1:
        return {f"{name}.{key}": part.contiguous() for key, part in mine._asdict().items()}
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    order = torch.arange(layout.world.size)
    holders = order.reshape(layout.replicas.size, layout.experts.size).T.contiguous()
    meshes = (
        (DeviceMesh("cpu", order), [Shard(0)], 1),
        (DeviceMesh("cpu", holders), [Shard(0)] * 2, layout.experts.size),
    )
    spread: dict[str, Tensor] = {}
    for (key, part), vector, (mesh, placements, times) in zip(mine._asdict().items(), own, meshes, strict=True):
        shape = torch.Size([len(vector) * times])
        spread[f"{name}.{key}"] = DTensor.from_local(
            part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=(1,)
        )
    return spread


def _from_stored(stored: Mapping[str, Any], like: TrainState, config: ModelConfig, layout: Layout) -> TrainState:
    experts = layout.own_experts(config)
    own = to_vectors(partition(like.params)[0], config)

    def mine(name: str) -> Vectors:
        parts = (stored[f"{name}.{key}"] for key in Vectors._fields)
        return Vectors(*(part.to_local() if layout.world.size > 1 else part for part in parts))

    def moment(name: str) -> Tree:
        if layout.shard_optimizer:
            return named_shares(mine(name), shares(own, layout)[0].start, config)
        return from_vectors(gathered(mine(name), own, layout), config, experts)

    router = unflatten({name[7:]: leaf for name, leaf in stored.items() if name.startswith("router.")})
    fast = from_vectors(gathered(mine("params"), own, layout), config, experts)
    router_opt = unflatten({name[11:]: leaf for name, leaf in stored.items() if name.startswith("router_opt.")})
    return TrainState(
        tree_map(lambda _, leaf: leaf, like.params, merge(fast, router)),
        AdamWState(stored["updates"], moment("mu"), moment("nu")),
        AdamWState(**router_opt),
        stored["step"],
    )


def _empty_state(config: ModelConfig, layout: Layout) -> TrainState:
    """A state of this process's shapes, of any content."""
    fresh = init_state(config, torch.Generator().manual_seed(0))
    router = partition(fresh.params)[1]
    own = unflatten(
        {name: torch.zeros(shape) for name, shape in fast_shapes(config, layout.own_experts(config)).items()}
    )
    vectors = to_vectors(own, config)
    where = shares(vectors, layout)
    zeros = Vectors(*(vector[part] for vector, part in zip(vectors, where, strict=True)))
    moment = named_shares(zeros, where[0].start, config) if layout.shard_optimizer else own
    params = tree_map(lambda _, leaf: leaf, fresh.params, merge(own, router))
    copies = (tree_map(torch.clone, moment) for _ in range(2))
    return TrainState(params, AdamWState(fresh.expert_opt.updates, *copies), fresh.router_opt, fresh.step)


def _library() -> Any:
    """Four seconds of imports that other runs do without."""
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
    """Makes what the index of a checkpoint is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name != "BytesStorageMetadata" and (dtype or module in PLAIN or (module, name) in NAMED):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_index(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _Looking(file).load()
    except Exception as error:  # whatever a broken pickle raises
        raise UserError(f"{path}: expected the index of a sharded checkpoint, got: {error}; {TRUST}") from None
