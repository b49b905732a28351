"""Documents -> two streams of tokens on disk that share no document: what is trained on and what is held out.

A stream is the documents' tokens, each closed by a boundary, and beside it a flag for each token: 1 where it is to be
learned, 0 where it is only context (the turns of a chat that are not the assistant's). Nothing but the document at
hand is in memory.

Tokens are bytes, 0 to 255, and the boundary 256. Another tokenizer replaces `encode`, `decode` and `count_bytes`.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.sources import Document

BOUNDARY = 256
BOUNDARY_TEXT = "<|endoftext|>"
VOCAB_SIZE = 257
SIDES = ("train", "held_out")
WIDTHS = {"tokens": 2, "targets": 1}  # bytes of a token in the files of a side: uint16 and uint8
CHUNK = 1 << 22  # tokens handled at a time
HALF_PAIRS = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that do not stand for a byte

Tokens = npt.NDArray[np.uint16]


def encode(text: str) -> Tokens:
    """Text -> (n,) tokens, the bytes of its UTF-8; a byte that was none (`surrogateescape`) comes back as it was."""
    return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)


def decode(tokens: npt.ArrayLike) -> str:
    """Tokens -> text; a boundary is spelled out, what is no UTF-8 or no token becomes U+FFFD."""
    spelled = {BOUNDARY: BOUNDARY_TEXT.encode()}
    values = np.asarray(tokens, np.int64).reshape(-1).tolist()
    parts = (bytes((value,)) if 0 <= value < BOUNDARY else spelled.get(value, b"\xff") for value in values)
    return b"".join(parts).decode("utf-8", "replace")


def count_bytes(tokens: Tokens) -> int:
    """Bytes of text that tokens stand for: a boundary stands for none."""
    return int(np.count_nonzero(tokens != BOUNDARY))


def is_held_out(document: Document, holdout: float) -> bool:
    """Whether a document is on the held-out side: decided by the hash of its text, so by nothing else.

    Equal documents are on the same side; a larger `holdout` holds out the same documents and more.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in document:
        for piece in _pieces(part.text):
            digest.update(_utf8(piece))
    return int.from_bytes(digest.digest(), "big") < holdout * 2**64


def resolve_split(split: str, documents: Iterable[Document]) -> tuple[str, Iterator[Document]]:
    """`auto` -> `tail` if there is only one document, else `document`; returns the documents, too, none consumed."""
    rest = iter(documents)
    first = list(islice(rest, 2))
    if split == "auto":
        split = "document" if len(first) > 1 else "tail"
    return split, chain(first, rest)


def write_streams(folder: Path, documents: Iterable[Document], holdout: float, split: str, bar: tqdm) -> None:
    """Write `train.tokens`, `train.targets`, `held_out.tokens` and `held_out.targets` into a folder.

    Args:
        split: `document`, or `tail`: the last share `holdout` of the tokens, not counting the last boundary.
        bar: told of every byte.
    """
    with ExitStack() as stack:
        sides = [[stack.enter_context(open(_stream(folder, side, part), "wb")) for part in WIDTHS] for side in SIDES]
        for document in documents:
            tokens_file, targets_file = sides[split == "document" and is_held_out(document, holdout)]
            for tokens, is_target in _tokenized(document):
                tokens_file.write(tokens.tobytes())
                targets_file.write(bytes([is_target]) * len(tokens))
                bar.update(len(tokens))
    if split == "tail":
        train, held_out = SIDES
        cut = int((_stream(folder, train, "targets").stat().st_size - 1) * (1 - holdout))
        for part, width in WIDTHS.items():
            _move_tail(_stream(folder, train, part), _stream(folder, held_out, part), cut * width)


def _tokenized(document: Document) -> Iterator[tuple[Tokens, bool]]:
    """The tokens of a document in parts, and whether they are learned; the boundary is if what it closes is."""
    for part in document:
        yield from ((encode(piece), part.is_target) for piece in _pieces(part.text))
    yield np.array([BOUNDARY], np.uint16), document[-1].is_target


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair, which stands for nothing
        return HALF_PAIRS.sub("\ufffd", text).encode("utf-8", "surrogateescape")


def _stream(folder: Path, side: str, part: str) -> Path:
    return folder / f"{side}.{part}"


def _move_tail(source: Path, target: Path, start: int) -> None:
    with source.open("r+b") as whole, target.open("wb") as tail:
        whole.seek(start)
        shutil.copyfileobj(whole, tail)
        whole.truncate(start)
