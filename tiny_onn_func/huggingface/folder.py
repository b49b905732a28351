"""A folder of safetensors, single or sharded with an index: read by its headers first, written whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiny_onn_func.huggingface.config import CONFIG, SECTION, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 28
SHARD_BYTES = 2 << 30
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_NAME = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")
OURS = re.compile(  # what a folder that was written here consists of
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|README\.md"
)


class Stored(NamedTuple):
    """Where a tensor is and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32


# Reading --------------------------------------------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name -> Stored of every tensor in a folder's safetensors; no tensor is read, a pickle is never opened.

    Raises:
        ValueError: no safetensors, a shard that is missing, damaged or outside the folder, a tensor that is in two
            shards, or not in the one that the index names; one line that names file and tensor.
    """
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        came = f"{shown(pickles[0])}, a pickle, which may run code when it is opened" if pickles else "neither"
        raise ValueError(f"{shown(folder)}: expected {SINGLE} or {INDEX}, got {came}; save the model as safetensors")
    places = _index(folder / INDEX)
    stored: dict[str, Stored] = {}
    for shard in sorted({*places.values()}):
        if not (folder / shard).is_file():
            raise ValueError(f"{shown(folder / shard)}: expected the shard that {INDEX} names, got no such file")
        for name, entry in _header(folder / shard).items():
            if places.get(name) != shard:
                place = places.get(name, "no file")
                raise ValueError(
                    f"{shown(entry.file)}: {shown(name)}: expected in {shown(place)} by {INDEX}, got it here"
                )
            stored[name] = entry
    for name in sorted(places.keys() - stored.keys()):
        raise ValueError(f"{shown(folder / places[name])}: expected the tensor {shown(name)} by {INDEX}, got none")
    return stored


def read_tensors(stored: Mapping[str, Stored], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one, each file opened once; the tensors may be views of a mapped file: copy them.

    Raises:
        ValueError: a file that cannot be read any more.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    for path, inside in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in inside:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shown(path)}: expected safetensors, got: {shown(error)}") from None


def _index(path: Path) -> dict[str, str]:
    """Tensor -> shard, a plain file name beside the index."""
    places = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{shown(path)}: weight_map: expected tensor names and their files, got {shown(places)}")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f"{shown(path)}: {shown(name)}: expected a .safetensors file beside it, got {shown(shard)}"
            )
    return places


def _header(path: Path) -> dict[str, Stored]:
    """A file's header; safetensors checks it against the length of the file, so a cut one does not pass."""
    if not path.is_file():
        raise ValueError(f"{shown(path)}: expected a regular file, got something else")
    stored = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shown(path)}: expected safetensors, got: {shown(error)}; fetch it again") from None
    for name, entry in stored.items():
        if entry.dtype not in DTYPES:
            wanted = ", ".join(DTYPES)
            raise ValueError(f"{shown(path)}: {shown(name)}: expected one of {wanted}, got {shown(entry.dtype)}")
    return stored


# Writing --------------------------------------------------------------------------------------------------------------


def check_target(folder: str | Path) -> Path:
    """The absolute path of a folder to write: new, empty, or one that holds only what `write_folder` once wrote.

    Raises:
        ValueError: anything else is there; nothing of another's is ever overwritten.
    """
    target = Path(folder).resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{shown(target)}: expected a new folder, got a file; name another")
    names = sorted(path.name for path in target.iterdir())
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if names and not foreign and not (CONFIG in names and SECTION in read_json(target / CONFIG, MAX_INDEX_BYTES)):
        foreign = names
    if foreign:
        raise ValueError(f"{shown(target)}: expected a new or empty folder, got one with {foreign[0]!r}; name another")
    return target


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    groups: Iterable[Mapping[str, Tensor]],
    *,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, the weights and other files into a draft beside the folder, then rename it.

    Args:
        groups: tensors by name, contiguous and on the CPU; a shard is as many groups as fit, never less than one.
            No more than one shard is in memory.
        files: name -> content of what goes beside the weights.
        shard_bytes: the size of a shard; what fits into one is a single model.safetensors.

    Returns:
        The folder. When anything fails, what was there before is there still, and nothing else.

    Raises:
        ValueError: the folder is taken (`check_target`), or the disk refuses.
    """
    target = check_target(folder)
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        _write_weights(draft, groups, shard_bytes)
        for name, content in {**(files or {}), CONFIG: _json(config)}.items():
            (draft / name).write_bytes(content)
        for path in draft.iterdir():
            shutil.copymode(draft / CONFIG, path)  # safetensors keeps its files to their owner
            _flush(path)
        _flush(draft)
        _publish(draft, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise ValueError(f"{shown(target)}: the disk refused it: {reason}; free space or name another") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write_weights(draft: Path, groups: Iterable[Mapping[str, Tensor]], shard_bytes: int) -> None:
    """The number of shards is part of their names, and known when the last one is written."""
    contents: list[list[str]] = []
    total = 0
    for shard in _packed(groups, shard_bytes):
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, draft / f"{len(contents)}.part", metadata={"format": "pt"})
        contents.append([*shard])
        shard.clear()  # before the next one is made
    if len(contents) == 1:
        os.rename(draft / "0.part", draft / SINGLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(contents):
        shard_name = f"model-{number + 1:05d}-of-{len(contents):05d}.safetensors"
        os.rename(draft / f"{number}.part", draft / shard_name)
        places |= dict.fromkeys(names, shard_name)
    (draft / INDEX).write_bytes(_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}))


def _packed(groups: Iterable[Mapping[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for group in groups:
        more = sum(tensor.nbytes for tensor in group.values())
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard.update(group)
        size += more
    yield shard


def _publish(draft: Path, target: Path) -> None:
    """Rename the draft; what is there steps aside first, and comes back when the renaming fails."""
    aside = draft.with_name(f"{draft.name}-old")
    replaces = target.exists()
    if replaces:
        os.replace(target, aside)
    try:
        os.replace(draft, target)
    except BaseException:
        if replaces:
            os.replace(aside, target)
        raise
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
