"""Entries of the cache of tokens: folders with both sides' streams that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.mixture import Part
from training.data.readers import printable
from training.data.streams import CHUNK, SIDES
from training.data.tokenizer import Tokenizer, Tokens
from training.errors import UserError

RECORD = "entry.json"


class Side(NamedTuple):
    """One side's memory-mapped streams and their counts, as in `training.data.corpus.Corpus`."""

    tokens: Tokens
    targets: npt.NDArray[np.uint8]
    num_bytes: int
    num_targets: int
    num_documents: int


class Entry(NamedTuple):
    """Both sides, the split that made them, and the parts of a mixture's training side."""

    sides: tuple[Side, Side]
    split: str
    parts: tuple[Part, ...]


def digest(values: Any) -> str:
    """Name of an entry that depends on these values."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def load_entry(entry: Path) -> Entry | None:
    """An entry of the cache; None if it is not there, or its files are not of the lengths that its record names."""
    try:
        record = json.loads((entry / RECORD).read_text(encoding="utf-8"))
        train, held_out = (_open_side(entry, side, record[side]) for side in SIDES)
        parts = tuple(Part(*part) for part in record.get("parts", ()))
        if parts and parts[-1].stop != train.tokens.size:
            raise ValueError(f"expected parts of {train.tokens.size} tokens, got {parts[-1].stop}")
        return Entry((train, held_out), str(record["split"]), parts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _open_side(entry: Path, side: str, record: Mapping[str, Any]) -> Side:
    tokens = _map(entry / f"{side}.tokens", np.dtype(record.get("dtype", "uint16")).type)
    targets = _map(entry / f"{side}.targets", np.uint8)
    if not tokens.size == targets.size == record["tokens"]:
        raise ValueError(f"expected {record['tokens']} tokens, got {tokens.size} and {targets.size} flags")
    return Side(tokens, targets, int(record["bytes"]), int(record["targets"]), int(record["documents"]))


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def make_entry(entry: Path, write: Callable[[Path], dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Write streams and their record into a draft beside an entry, then move it there."""
    draft = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        record = write(draft) | {side: _measure(draft, side, tokenizer) for side in SIDES}
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
        publish(draft, entry)
    except OSError as error:
        name, came = printable(entry.parent), error.strerror or error
        raise UserError(
            f"{name}: expected a folder to cache tokens in, got: {came}; name another in TINY_ONN_CACHE"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _measure(folder: Path, side: str, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens, targets = _map(folder / f"{side}.tokens", tokenizer.dtype), _map(folder / f"{side}.targets", np.uint8)
    chunks = [tokens[start : start + CHUNK] for start in range(0, tokens.size, CHUNK)]
    wide = {} if tokens.dtype == np.uint16 else {"dtype": tokens.dtype.name}
    return wide | {
        "tokens": tokens.size,
        "bytes": sum(int(tokenizer.lengths[chunk].sum(dtype=np.int64)) for chunk in chunks),
        "targets": int(np.count_nonzero(targets[1:])),
        "documents": sum(int(np.count_nonzero(chunk == tokenizer.boundary)) for chunk in chunks),
    }


def publish(draft: Path, entry: Path) -> None:
    """Make a draft the entry, in one step and on disk; an entry that is already there and whole is as good."""
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves files of the right length, full of zeros
    if load_entry(entry) is None:
        shutil.rmtree(entry, ignore_errors=True)
        entry.unlink(missing_ok=True)  # if it is no folder
    try:
        os.replace(draft, entry)
    except OSError:
        if load_entry(entry) is None:
            raise
