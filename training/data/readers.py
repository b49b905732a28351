"""Read documents from text, JSON lines, Parquet and gzip files."""

import codecs
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from training.errors import UserError

COLUMNS = ("messages", "text")  # of a Parquet file, the first that it has is read
ROWS = 16  # of a Parquet file that are unpacked at a time
PIECE = 1 << 20  # bytes of a text that are read at a time
LINE = 1 << 24  # most bytes of a line of JSON
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
        with _unpacked(self.path) as file:
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


def _read_module(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    yield (Segment(text.replace("\r\n", "\n"), True),)  # line ends differ between platforms, the text does not


def _read_member(path: Path) -> Iterator[Document]:
    """A file of a folder: like a file that is named, but binary ones are passed over."""
    if (rows := _rows(path)) is not None:
        yield from rows
    elif (text := _text(path)) is not None:
        yield text


def _read_file(path: Path) -> Iterator[Document]:
    name = printable(path)
    if not path.is_file():
        raise UserError(f"{name}: expected a regular file, got a pipe or a device; save it to a file first")
    if (rows := _rows(path)) is not None:
        yield from rows
    elif (text := _text(path)) is None:
        raise UserError(f"{name}: expected a text file, got a binary one (it has NUL bytes); save its text as UTF-8")
    else:
        yield text


def _rows(path: Path) -> Iterator[Document] | None:
    """Documents of a file with one a line or a row, as its name says; None for a text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _learnable(path, _read_parquet(path))
    jsonl = suffixes[-2:] == [".jsonl", ".gz"] or suffixes[-1:] == [".jsonl"]
    return _learnable(path, _read_jsonl(path)) if jsonl else None


def _text(path: Path) -> Document | None:
    """The text of a file, None if it is binary; all of it is looked at before any of it is used."""
    pieces, size = [], 0
    with _unpacked(path) as file:
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


def _unpacked(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


# Lines and rows -------------------------------------------------------------------------------------------------------


def _learnable(path: Path, documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; in the end, a complaint if nothing in any of them is to be learned."""
    has_documents, learned, name = False, False, printable(path)
    for document in documents:
        has_documents, learned = True, learned or any(part.is_target for part in document)
        yield document
    if has_documents and not learned:
        raise UserError(
            f"{name}: expected chats with assistant turns (only those are learned), got none; "
            'name that role "assistant"'
        )


def _read_jsonl(path: Path) -> Iterator[Document]:
    """One document a line: {"text": ...} or {"messages": [{"role": ..., "content": ...}, ...]}; blank lines are none.

    A line with both is a chat. Other keys are of no interest.
    """
    name = printable(path)
    with _unpacked(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LINE + 1), b""), 1):
            if len(line) > LINE:
                raise UserError(f"{name}, line {number}: expected at most {LINE:,} bytes, got more; cut the document")
            if line.strip():
                yield _parse(line, f"{name}, line {number}", "utf-8" if number > 1 else "utf-8-sig")


def _read_parquet(path: Path) -> Iterator[Document]:
    """One document a row; of a row group, a page and a few rows are in memory."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{printable(path)}: Parquet wants the package pyarrow; pip install tiny-onn-func[data]"
        ) from None
    name, number = printable(path), 0
    try:
        with ParquetFile(path, buffer_size=PIECE) as file:
            names = [str(column) for column in file.schema_arrow.names]
            column = next((column for column in COLUMNS if column in names), None)
            if column is None:
                came = ", ".join(printable(key) for key in names[:8]) or "no column at all"
                raise UserError(f"{name}: expected the column `text` or `messages`, got {came}; rename one of them")
            for group in range(file.num_row_groups):  # one after the other: iter_batches over all reads ahead
                for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(column):
                        number += 1
                        yield _document({column: value.as_py()}, f"{name}, row {number}")
    except (ArrowException, OSError) as error:
        came = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: expected a Parquet file, got: {came}; fetch it again") from None


def _parse(line: bytes, place: str, encoding: str) -> Document:
    try:
        record = json.loads(line.decode(encoding))
    except (ValueError, RecursionError) as error:
        came = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place}: expected a JSON object, got no JSON ({came})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object with `text` or `messages`, got {_kind(record)}")
    return _document(record, place)


def _document(record: Mapping[str, Any], place: str) -> Document:
    """The document that a line or a row describes."""
    if "messages" in record:
        return chat_document(_turns(record["messages"], place))
    if "text" not in record:
        came = ", ".join(printable(key) for key in [*record][:8]) or "no key at all"
        raise UserError(f"{place}: expected the key `text` or `messages`, got {came}; rename one of them")
    if not isinstance(record["text"], str):
        raise UserError(f"{place}: expected `text` to be a string, got {_kind(record['text'])}")
    return (Segment(record["text"], True),)


def _turns(messages: Any, place: str) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: expected `messages` to be a list of turns, got {_kind(messages)}")
    for position, turn in enumerate(messages):
        if not isinstance(turn, dict):
            raise UserError(f"{place}: expected messages[{position}] to be an object, got {_kind(turn)}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                came = _kind(turn[key]) if key in turn else "no such key"
                raise UserError(f"{place}: expected messages[{position}].{key} to be a string, got {came}")
        yield turn["role"], turn["content"]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    kinds |= {bytes: "bytes"}
    empty = "an empty list" if value == [] else None
    return empty or kinds.get(type(value), "a number")
