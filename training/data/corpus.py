"""A source as two memory-mapped streams of tokens, to train on and held out; made once and cached on disk.

The split is fixed by document, so that no held-out text is ever trained on:

- `document`: the hash of a document's content decides its side. Equal documents are on the same side, and neither other
  documents nor their order move any.
- `tail`: the last share `holdout` of the text is held out, whatever documents it is made of.
- `auto`: `tail` for a single document, and where all documents with something to learn would be on one side, as can
  happen with few; else `document`.

A cache entry is a folder that appears whole or not at all. Its name hashes all that the tokens depend on: the files'
paths, sizes and times, the Python version (stdlib), the split, the tokenizer. Entries are never deleted, only left
unused: clear the cache by deleting its folder.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.readers import printable, refuse
from training.data.sources import Source, documents, find_source
from training.data.streams import CHUNK, SIDES, resolve_split, write_streams
from training.data.tokenizer import BYTES, Tokenizer, Tokens
from training.errors import UserError
from training.storage.atomic import cache_folder
from training.terminal import LOG
from training.terminal import progress as progress_bar

FORMAT = 1  # of the cache; a new number forgets the entries of the old one
RECORD = "entry.json"
NEW_KINDS = (".gz", ".parquet")  # files that folders passed over as binary when FORMAT was chosen


class Corpus(NamedTuple):
    """One side of a split; the arrays are memory-mapped and read-only.

    tokens: (n,) uint16, or uint32 where the tokenizer has more than 65,536 ids.
    targets: (n,) uint8, 1 where the token is learned, 0 where it is only context.
    num_bytes: bytes of its text; boundaries are none.
    num_targets: targets that have a token before them, so can be predicted.
    num_documents: documents that end here.
    tokenizer: what the tokens mean.
    """

    tokens: Tokens
    targets: npt.NDArray[np.uint8]
    num_bytes: int
    num_targets: int
    num_documents: int
    tokenizer: Tokenizer = BYTES


class Splits(NamedTuple):
    """The two sides of a source, the split that made them (`document` or `tail`), and where they are cached."""

    train: Corpus
    held_out: Corpus
    source: str
    split: str
    folder: Path


def open_corpus(
    source: str,
    *,
    sequence_length: int,
    holdout: float = 0.1,
    split: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
    tokenizer: Tokenizer = BYTES,
) -> Splits:
    """The tokens of a source, from the cache or made now.

    Args:
        source: what `training.data.sources` knows: stdlib, a text file, a folder, a glob, .jsonl, .parquet, .gz.
        sequence_length: tokens of a training sequence; each side must have room for one and its last target.
        holdout: share that is held out, in (0, 1): of the documents, or of the text with `tail`.
        split: `auto`, `document` or `tail`.
        cache_dir: default $TINY_ONN_CACHE, else ~/.cache/tiny-onn.
        progress: show a bar on the error stream if tokenizing takes more than a second.
        tokenizer: text -> tokens; the bytes themselves by default.

    Raises:
        UserError: an argument out of range, a source that cannot be read, a side that is too short, no room to write.
    """
    if not 0 < holdout < 1:
        raise UserError(f"holdout: expected more than 0 and less than 1, got {holdout!r}")
    if split not in ("auto", "document", "tail"):
        raise UserError(f"split: expected auto, document or tail, got {split!r}")
    if sequence_length < 1:
        raise UserError(f"sequence_length: expected 1 or more, got {sequence_length!r}")
    home = Path(os.path.expanduser(cache_dir)) if cache_dir else cache_folder()
    files = find_source(source)
    splits = _cached(files, home, holdout, split, progress, tokenizer)
    if split == "auto" and not (splits.train.num_targets and splits.held_out.num_targets):
        splits = _cached(files, home, holdout, "tail", progress, tokenizer)
    if lack := _lack(splits, sequence_length):
        tails = ((share, _cached(files, home, share, "tail", False, tokenizer)) for share in SHARES)
        fits = (share for share, tail in tails if not _lack(tail, sequence_length))
        raise TooLittleText(f"{splits.source}: {lack}", next(fits, None))
    return splits


def whole(splits: Splits) -> Corpus:
    """Both sides as one, in memory: of `tail`, the text as it is."""
    train, held_out = splits.train, splits.held_out
    targets = np.concatenate([train.targets, held_out.targets])
    return Corpus(
        tokens=np.concatenate([train.tokens, held_out.tokens]),
        targets=targets,
        num_bytes=train.num_bytes + held_out.num_bytes,
        num_targets=int(np.count_nonzero(targets[1:])),
        num_documents=train.num_documents + held_out.num_documents,
        tokenizer=train.tokenizer,
    )


SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of a text, one of which parts it where any does


class TooLittleText(UserError):
    """A side of a text has no room for a sequence, or nothing to learn.

    Args:
        holdout: with which `split: tail` leaves enough on each side; None if there is none.
    """

    def __init__(self, lack: str, holdout: float | None) -> None:
        parted = "or a smaller sequence_length" if holdout is None else f"or split: tail and holdout: {holdout:g}"
        super().__init__(f"{lack}; give more text, {parted}")
        self.holdout = holdout


def _lack(splits: Splits, sequence_length: int) -> str | None:
    """Say what a side lacks; None if nothing."""
    train, held_out = splits.train, splits.held_out
    if min(train.tokens.size, held_out.tokens.size) < sequence_length + 1:
        return (
            f"expected at least {sequence_length + 1} tokens (sequence_length + 1) on each side, got "
            f"{train.tokens.size} to train on and {held_out.tokens.size} held out, from a text of "
            f"{train.num_bytes + held_out.num_bytes} bytes"
        )
    if not (train.num_targets and held_out.num_targets):
        return (
            f"expected assistant turns on each side, got {train.num_targets} tokens of them to train on and "
            f"{held_out.num_targets} held out"
        )
    return None


# Cache ----------------------------------------------------------------------------------------------------------------


def _cached(
    source: Source, home: Path, holdout: float, split: str, progress: bool, tokenizer: Tokenizer
) -> Splits:  # fmt: skip
    """The entry of a source and its split, made if it is not there."""
    entry = home / _key(source, holdout, split, tokenizer)
    splits = _load(entry, source.name, tokenizer)
    if splits is None:
        _build(source, entry, holdout, split, progress, tokenizer)
        splits = _load(entry, source.name, tokenizer)
    if splits is None:
        raise UserError(f"{printable(entry)}: expected the tokens just written, got something else; is the disk full?")
    return splits


def _key(source: Source, holdout: float, split: str, tokenizer: Tokenizer) -> str:
    folders = {folder: str(folder.resolve()) for folder in {file.parent for file in source.files}}
    stats = ((file, _stat(file)) for file in source.files)
    files = [(folders[file.parent], file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    version = sys.version if source.name == "stdlib" else None
    parts: list[Any] = [FORMAT, version, source.read.__name__, split, holdout, files]
    if any(file.suffix.lower() in NEW_KINDS for file in source.files):
        parts.append("unpacked")
    if tokenizer is not BYTES:  # the entries of the bytes keep their names
        parts.append(tokenizer.fingerprint)
    identity = json.dumps(parts)
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        refuse(printable(file), error)


def _load(entry: Path, source: str, tokenizer: Tokenizer = BYTES) -> Splits | None:
    """An entry of the cache; None if it is not there, or its files are not of the lengths that its record names."""
    try:
        record = json.loads((entry / RECORD).read_text(encoding="utf-8"))
        train, held_out = (_open_side(entry, side, record[side], tokenizer) for side in SIDES)
        return Splits(train, held_out, source, str(record["split"]), entry)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _open_side(entry: Path, side: str, record: Mapping[str, Any], tokenizer: Tokenizer) -> Corpus:
    tokens = _map(entry / f"{side}.tokens", np.dtype(record.get("dtype", "uint16")).type)
    targets = _map(entry / f"{side}.targets", np.uint8)
    if not tokens.size == targets.size == record["tokens"]:
        raise ValueError(f"expected {record['tokens']} tokens, got {tokens.size} and {targets.size} flags")
    return Corpus(tokens, targets, int(record["bytes"]), int(record["targets"]), int(record["documents"]), tokenizer)


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _build(source: Source, entry: Path, holdout: float, split: str, progress: bool, tokenizer: Tokenizer) -> None:
    """Tokenize into a draft beside the entry, then move it there."""
    draft = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        split, docs = resolve_split(split, documents(source))
        size, desc = sum(_stat(file).st_size for file in source.files), f"tokenizing {source.name}"
        with progress_bar(total=size, desc=desc, unit="B", unit_scale=True, delay=1.0, shown=progress) as bar:
            write_streams(draft, docs, holdout, split, bar, tokenizer)
            bar.update(max(0, size - bar.n))  # JSON lines have more bytes than their text
        record = {"split": split} | {side: _measure(draft, side, tokenizer) for side in SIDES}
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
        _publish(draft, entry)
        LOG.debug("tokens of %s kept in %s", source.name, entry)
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


def _publish(draft: Path, entry: Path) -> None:
    """Make a draft the entry, in one step and on disk; an entry that is already there and whole is as good."""
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves files of the right length, full of zeros
    if _load(entry, "") is None:
        shutil.rmtree(entry, ignore_errors=True)
        entry.unlink(missing_ok=True)  # if it is no folder
    try:
        os.replace(draft, entry)
    except OSError:
        if _load(entry, "") is None:
            raise


WINDOWS, WINDOW = 256, 65_536  # of a text that are looked at, and tokens of each


def fingerprint(corpus: Splits) -> str:
    """Of both sides' tokens: all of them up to 16 million, of longer texts evenly spaced windows, and their number."""
    digest = hashlib.blake2b(digest_size=16)
    for side in (corpus.train, corpus.held_out):
        total = len(side.tokens)
        digest.update(f"{total} {side.num_documents} {side.tokens.dtype} ".encode())
        stride = max(WINDOW, total // WINDOWS)
        for start in range(0, total, stride):
            digest.update(side.tokens[start : start + WINDOW].tobytes())
    return digest.hexdigest()
