"""Documents -> two streams of tokens on disk, training and held out, that share no document.

A stream is the documents' tokens, each closed by a boundary, and beside it a flag for each token: 1 where it is to be
learned, 0 where it is only context (the turns of a chat that are not the assistant's). Nothing but the document at
hand is in memory, of a long one a piece.

Which document is held out, and where a text is cut into two, is decided by text and bytes, so it is the same for every
tokenizer, up to the token that the cut meets.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.data.readers import SEAM, Document, Segment, plain
from training.data.tokenizer import (
    BYTES,
    TURN_END,
    TURN_START,
    Tokenizer,
    Tokens,
    encode_bytes,
    utf8,
)
from training.terminal import ProgressBar

SIDES = ("train", "held_out")
CHUNK = 1 << 22  # tokens handled at a time
PIECE = 1 << 16  # characters that a tokenizer other than the bytes is given at a time

encode = encode_bytes


def decode(tokens: npt.ArrayLike) -> str:
    """Bytes as tokens -> text; a boundary is spelled out, what is no UTF-8 or no token becomes U+FFFD."""
    return BYTES.decode(tokens)


def is_held_out(document: Document, holdout: float) -> bool:
    """True if a document is on the held-out side: a function of the hash of its text alone.

    Equal documents are on the same side; a larger `holdout` holds out the same documents and more.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in plain(document):
        for piece in _pieces(part.text):
            digest.update(utf8(piece))
    return int.from_bytes(digest.digest(), "big") < holdout * 2**64


def resolve_split(split: str, documents: Iterable[Document]) -> tuple[str, Iterator[Document]]:
    """`auto` -> `tail` if there is only one document, else `document`; returns the documents, too, none consumed."""
    rest = iter(documents)
    first = list(islice(rest, 2))
    if split == "auto":
        split = "document" if len(first) > 1 else "tail"
    return split, chain(first, rest)


def has_both_sides(documents: Iterable[Document], holdout: float) -> bool:
    """True if training and held-out side both have a document with targets; stops reading once that is known."""
    sides = set()
    for document in documents:
        if any(part.is_target for part in document):
            sides.add(is_held_out(document, holdout))
        if len(sides) == 2:
            return True
    return False


def write_streams(
    folder: Path,
    documents: Iterable[Document],
    holdout: float,
    split: str,
    bar: ProgressBar,
    tokenizer: Tokenizer = BYTES,
) -> None:
    """Write `train.tokens`, `train.targets`, `held_out.tokens` and `held_out.targets` into a folder.

    Args:
        split: `document`, or `tail`: the last share `holdout` of the bytes and boundaries but the last.
        bar: told of every byte.
    """
    widths = {"tokens": np.dtype(tokenizer.dtype).itemsize, "targets": 1}  # bytes of a token in the files of a side
    with ExitStack() as stack:
        sides = [[stack.enter_context(open(_stream(folder, side, part), "wb")) for part in widths] for side in SIDES]
        for document in documents:
            tokens_file, targets_file = sides[split == "document" and is_held_out(document, holdout)]
            for tokens, is_target in tokenized(document, tokenizer):
                tokens_file.write(tokens.tobytes())
                targets_file.write(bytes([is_target]) * len(tokens))
                bar.update(int(_weights(tokens, tokenizer).sum()))
    if split == "tail":
        train, held_out = SIDES
        cut = _tail_start(_stream(folder, train, "tokens"), holdout, tokenizer)
        for part, width in widths.items():
            _move_tail(_stream(folder, train, part), _stream(folder, held_out, part), cut * width)


def tokenized(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[Tokens, bool]]:
    """Yield (tokens, True if targets) for each part of a document, then for its boundary, a target if the last part is.

    Turns are `<|im_start|>` role newline content `<|im_end|>` newline (ChatML) where the tokenizer has those special
    tokens; the last newline is not learned: generated text stops before it. Else they are as `plain` writes them.
    """
    is_learned = False
    has_turns = {TURN_START, TURN_END} <= tokenizer.special.keys()
    for part in document if has_turns else plain(document):
        yield from _text(part, tokenizer) if part.role is None else _turn(part, tokenizer)
        is_learned = part.is_target
    yield tokenizer.one(tokenizer.boundary), is_learned


def _turn(part: Segment, tokenizer: Tokenizer) -> Iterator[tuple[Tokens, bool]]:
    start, end = (tokenizer.one(tokenizer.special[mark]) for mark in (TURN_START, TURN_END))
    yield start, False
    yield tokenizer.encode(f"{part.role}\n"), False
    yield from _text(part, tokenizer)
    yield end, part.is_target
    yield tokenizer.encode("\n"), False


def _text(part: Segment, tokenizer: Tokenizer) -> Iterator[tuple[Tokens, bool]]:
    pieces = _pieces(part.text) if tokenizer is BYTES else seamless(part.text)
    return ((tokenizer.encode(piece), part.is_target) for piece in pieces)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def seamless(text: str) -> Iterator[str]:
    """Split a text into pieces whose tokens are those of the whole, if a line begins with a letter now and then."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = max((seam.start() for seam in SEAM.finditer(text, start + 1, end)), default=end)
        yield text[start:end]
        start = end


def _weights(tokens: Tokens, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """The bytes of every token, one for a special token."""
    return np.maximum(tokenizer.lengths[tokens], 1)


def _tail_start(path: Path, holdout: float, tokenizer: Tokenizer) -> int:
    """The first token of the tail."""
    tokens = np.memmap(path, tokenizer.dtype, mode="r")
    parts = [tokens[start : start + CHUNK] for start in range(0, tokens.size, CHUNK)]
    sizes = [int(_weights(part, tokenizer).sum()) for part in parts]
    wanted, start = int((sum(sizes) - 1) * (1 - holdout)), 0
    for part, size in zip(parts, sizes, strict=True):
        if size > wanted:  # the first token that has `wanted` bytes or more before it is here, or begins the next part
            before = np.cumsum(_weights(part, tokenizer)) - _weights(part, tokenizer)
            return start + int(np.searchsorted(before, wanted))
        wanted, start = wanted - size, start + part.size
    return start


def _stream(folder: Path, side: str, part: str) -> Path:
    return folder / f"{side}.{part}"


def _move_tail(source: Path, target: Path, start: int) -> None:
    with source.open("r+b") as whole, target.open("wb") as tail:
        whole.seek(start)
        shutil.copyfileobj(whole, tail)
        whole.truncate(start)
