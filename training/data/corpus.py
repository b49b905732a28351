"""A source as two memory-mapped streams of tokens, to train on and held out; made once and cached on disk.

The split is fixed by document, so that no held-out text is ever trained on:

- `document`: the hash of a document's content decides its side. Equal documents are on the same side, and neither other
  documents nor their order move any.
- `tail`: the last share `holdout` of the text is held out, whatever documents it is made of.
- `auto`: `tail` for a single document, and where all documents with something to learn would be on one side, as can
  happen with few; else `document`.

Of a mixture (`training.data.mixture`) each source is split by itself.

The name of a cache entry (`training.data.cache`) hashes all that the tokens depend on: the files' paths, sizes and
times, the Python version (stdlib), a data set's version, the split, the tokenizer. Entries are never deleted, only
left unused: clear the cache by deleting its folder.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.cache import digest, load_entry, make_entry
from training.data.hub import Unreachable
from training.data.mixture import Part, Stream, Weighted, parse_mixture, taking_turns, write_side
from training.data.readers import printable, refuse
from training.data.sources import Source, documents, find_source
from training.data.streams import resolve_split, write_streams
from training.data.tokenizer import BYTES, Tokenizer, Tokens
from training.errors import UserError
from training.storage.atomic import cache_folder, write_text
from training.storage.regular_file import read_small
from training.terminal import LOG
from training.terminal import progress as progress_bar

FORMAT = 1  # of the cache; a new number forgets the entries of the old one
NEW_KINDS = (".gz", ".parquet")  # files that folders passed over as binary when FORMAT was chosen
LATER_KINDS = (".csv", ".tsv", ".tar", ".zst")  # read as texts or passed over before these readers were there


class Corpus(NamedTuple):
    """One side of a split; the arrays are memory-mapped and read-only.

    tokens: (n,) uint16, or uint32 where the tokenizer has more than 65,536 ids.
    targets: (n,) uint8, 1 where the token is learned, 0 where it is only context.
    num_bytes: bytes of its text; boundaries are none.
    num_targets: targets that have a token before them, so can be predicted.
    num_documents: documents that end here.
    tokenizer: what the tokens mean.
    parts: of the training side of a mixture, where each source is, and its weight.
    """

    tokens: Tokens
    targets: npt.NDArray[np.uint8]
    num_bytes: int
    num_targets: int
    num_documents: int
    tokenizer: Tokenizer = BYTES
    parts: tuple[Part, ...] = ()


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
        source: what `training.data.sources` knows: stdlib, a text file, a folder, a glob, .jsonl, .parquet, .csv, .tar,
            .gz, .zst, hf:NAME; or several with weights: a.txt:0.7,b.jsonl:0.3.
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
    parts = parse_mixture(source)
    splits = [_open_one(name, home, sequence_length, holdout, split, progress, tokenizer) for name, _ in parts]
    return splits[0] if len(parts) == 1 else _mixed(printable(source), parts, splits, home)


def _open_one(
    source: str, home: Path, sequence_length: int, holdout: float, split: str, progress: bool, tokenizer: Tokenizer
) -> Splits:
    try:
        files = find_source(source)
    except Unreachable:
        known = _load_known(source, home, holdout, split, tokenizer)
        if known is None or _lack(known, sequence_length):
            raise
        return known
    splits = _cached(files, home, holdout, split, progress, tokenizer)
    if split == "auto" and not (splits.train.num_targets and splits.held_out.num_targets):
        splits = _cached(files, home, holdout, "tail", progress, tokenizer)
    if lack := _lack(splits, sequence_length):
        tails = ((share, _cached(files, home, share, "tail", False, tokenizer)) for share in SHARES)
        fits = (share for share, tail in tails if not _lack(tail, sequence_length))
        raise TooLittleText(f"{splits.source}: {lack}", next(fits, None))
    if files.hub is not None:
        write_text(_known(source, home, holdout, split, tokenizer), splits.folder.name)
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
        splits = _loaded(entry, source.name, tokenizer)
    return splits


def _loaded(entry: Path, source: str, tokenizer: Tokenizer) -> Splits:
    """An entry that was just written."""
    splits = _load(entry, source, tokenizer)
    if splits is None:
        raise UserError(f"{printable(entry)}: expected the tokens just written, got something else; is the disk full?")
    return splits


def _key(source: Source, holdout: float, split: str, tokenizer: Tokenizer) -> str:
    folders = {folder: str(folder.resolve()) for folder in {file.parent for file in source.files}}
    stats = ((file, _stat(file)) for file in source.files)
    files = [(folders[file.parent], file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    version = sys.version if source.name == "stdlib" else None
    parts: list[Any] = [FORMAT, version, source.read.__name__, split, holdout, files]
    if source.hub is not None:
        parts.append([source.name, source.hub.version])
    if any(suffix.lower() in LATER_KINDS for file in source.files for suffix in file.suffixes[-2:]):
        parts.append("tables")
    if any(file.suffix.lower() in NEW_KINDS for file in source.files):
        parts.append("unpacked")
    if tokenizer is not BYTES:  # the entries of the bytes keep their names
        parts.append(tokenizer.fingerprint)
    return digest(parts)


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        refuse(printable(file), error)


def _load(entry: Path, source: str, tokenizer: Tokenizer) -> Splits | None:
    found = load_entry(entry)
    if found is None:
        return None
    train, held_out = (Corpus(*side, tokenizer) for side in found.sides)
    return Splits(train._replace(parts=found.parts), held_out, source, found.split, entry)


def _build(source: Source, entry: Path, holdout: float, split: str, progress: bool, tokenizer: Tokenizer) -> None:
    """Tokenize a source into an entry."""

    def write(draft: Path) -> dict[str, Any]:
        how, docs = resolve_split(split, documents(source))
        size, desc = sum(_stat(file).st_size for file in source.files), f"tokenizing {source.name}"
        with progress_bar(total=size or None, desc=desc, unit="B", unit_scale=True, delay=1.0, shown=progress) as bar:
            write_streams(draft, docs, holdout, how, bar, tokenizer)
            bar.update(max(0, size - bar.n))  # JSON lines have more bytes than their text
        return {"split": how}

    make_entry(entry, write, tokenizer)
    LOG.debug("tokens of %s kept in %s", source.name, entry)


# Data sets of the Hub without the Hub ---------------------------------------------------------------------------------


def _known(source: str, home: Path, holdout: float, split: str, tokenizer: Tokenizer) -> Path:
    """File with the name of the newest entry of a data set, for a machine that cannot ask which one is the newest."""
    return home / f"{digest(['newest', source, holdout, split, tokenizer.fingerprint])}.txt"


def _load_known(source: str, home: Path, holdout: float, split: str, tokenizer: Tokenizer) -> Splits | None:
    try:
        name = read_small(_known(source, home, holdout, split, tokenizer)).decode("ascii")
    except (OSError, ValueError):
        return None
    if re.fullmatch("[0-9a-f]{32}", name) is None:
        return None
    splits = _load(home / name, printable(source), tokenizer)
    if splits is not None:
        LOG.info("note: %s: the Hub does not answer; its tokens are those that the cache has", splits.source)
    return splits


# Mixtures -------------------------------------------------------------------------------------------------------------


def _mixed(name: str, parts: Sequence[Weighted], splits: Sequence[Splits], home: Path) -> Splits:
    """The entry of a mixture, made of those of its sources if it is not there."""
    tokenizer, weights = splits[0].train.tokenizer, [weight for _, weight in parts]
    entry = home / digest([FORMAT, "mixture", [part.folder.name for part in splits], weights])
    known = _load(entry, name, tokenizer)
    if known is not None:
        return known

    def write(draft: Path) -> dict[str, Any]:
        trains, held_outs = (
            [Stream(side.tokens, side.targets) for side in sides]
            for sides in zip(*(s[:2] for s in splits), strict=True)
        )
        write_side(draft, "train", trains)
        write_side(draft, "held_out", taking_turns(held_outs, weights, tokenizer.boundary))
        ends = [0, *accumulate(stream.tokens.size for stream in trains)]
        return {
            "split": ", ".join(sorted({part.split for part in splits})),
            "parts": [[*ends[i : i + 2], weight] for i, weight in enumerate(weights)],
        }

    make_entry(entry, write, tokenizer)
    return _loaded(entry, name, tokenizer)


WINDOWS, WINDOW = 256, 65_536  # of a text that are looked at, and tokens of each


def fingerprint(corpus: Splits) -> str:
    """Of both sides' tokens: all of them up to 16 million, of longer texts evenly spaced windows, and their number."""
    digest = hashlib.blake2b(digest_size=16)
    for part in corpus.train.parts:
        digest.update(f"{part.start} {part.stop} {part.weight!r} ".encode())
    for side in (corpus.train, corpus.held_out):
        total = len(side.tokens)
        digest.update(f"{total} {side.num_documents} {side.tokens.dtype} ".encode())
        stride = max(WINDOW, total // WINDOWS)
        for start in range(0, total, stride):
            digest.update(side.tokens[start : start + WINDOW].tobytes())
    return digest.hexdigest()
