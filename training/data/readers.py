"""Documents and their segments; text files, packed or not, as one document, a long one piece by piece."""

import codecs
import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from training.errors import UserError

PIECE = 1 << 20  # bytes of a text that are read at a time
LINE = 1 << 24  # most bytes of a line of JSON, of a row of a table, of a file in an archive
LONG = 1 << 24  # bytes of a text that are held in memory; of a longer one, a piece
SEAM = re.compile(r"(?<=\S\n)(?=\w)")  # where no byte-level tokenizer joins what is left and right


class Segment(NamedTuple):
    """A stretch of text that is learned (`is_target`) or is only context; with a role, what was said in a turn."""

    text: str
    is_target: bool
    role: str | None = None


@dataclass(frozen=True)
class LongText:
    """Segments of a text file, read anew, piece by piece, at every iteration."""

    path: Path

    def __iter__(self) -> Iterator[Segment]:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("surrogateescape"), ""
        with unpacked(self.path) as file:
            while piece := file.read(PIECE):
                rest += decoder.decode(piece)
                end = max((seam.start() for seam in SEAM.finditer(rest)), default=len(rest))
                yield Segment(rest[:end], True)
                rest = rest[end:]
        yield Segment(rest + decoder.decode(b"", final=True), True)


Document = tuple[Segment, ...] | LongText


def chat_document(messages: Iterable[tuple[str, str]]) -> Document:
    """(role, content) turns; learned are those of the assistant, all else is context."""
    return tuple(Segment(content, role == "assistant", role) for role, content in messages)


def plain(document: Document) -> Iterator[Segment]:
    """The parts of a document, a turn as `<|role|>` newline `content` `<|end|>` newline.

    The end of a turn is learned if the turn is. The marks are ordinary text, so every tokenizer can write them (and a
    content that spells them cannot be told from them).
    """
    for part in document:
        if part.role is None:
            yield part
        else:
            yield from (Segment(f"<|{part.role}|>\n", False), Segment(f"{part.text}<|end|>\n", part.is_target))


def printable(name: str | Path) -> str:
    """A file's name on one line."""
    return str(name) if str(name).isprintable() else repr(str(name))


def refuse(name: str, error: Exception) -> NoReturn:
    """The one line about a file that the system does not hand out."""
    raise UserError(f"{name}: expected a file that can be read, got: {getattr(error, 'strerror', None) or error}")


# Text -----------------------------------------------------------------------------------------------------------------


def text_document(path: Path) -> Document | None:
    """The text of a file, None if it is binary; all of it is looked at before any of it is used."""
    pieces, size = [], 0
    with unpacked(path) as file:
        while piece := file.read(PIECE):
            if b"\0" in piece:
                return None
            size += len(piece)
            if size <= LONG:
                pieces.append(piece)
            else:
                pieces.clear()
    if size > LONG:
        return LongText(path)
    return (Segment(b"".join(pieces).decode("utf-8", "surrogateescape"), True),)


def unpacked(path: Path) -> BufferedIOBase:
    """Open a file of bytes, decompressed as it is read if its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return BufferedReader(_open_zst(path), PIECE)
    return gzip.open(path) if suffix == ".gz" else path.open("rb")


def _open_zst(path: Path) -> Any:
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise UserError(f"{printable(path)}: .zst wants the package pyarrow; pip install tiny-onn-func[data]") from None
    return CompressedInputStream(path.open("rb"), "zstd")
