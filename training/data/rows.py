"""Files of rows, each row a document: JSON lines, Parquet, CSV, and WebDataset archives; a few rows are in memory."""

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from io import BufferedReader, FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

from training.data.readers import LINE, PIECE, Document, Segment, chat_document, printable, unpacked
from training.errors import UserError

COLUMNS = ("messages", "text")  # of a Parquet file, the first that it has is read
ROWS = 16  # of a Parquet file that are unpacked at a time
PACKED = (".gz", ".zst")
SAMPLE = {"txt": "text", "text": "text", "json": "json", "jsn": "json"}  # WebDataset: ending of a file -> its kind


def rows(path: Path) -> Iterator[Document] | None:
    """Documents of a file with one a line, row or sample, as its name says; None for a text."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] == [".parquet"]:
        return learnable(printable(path), _read_parquet(path))
    if endings[-1:] == [".tar"]:
        return learnable(printable(path), _read_webdataset(path))
    kind = endings[-2:-1] if endings[-1:] and endings[-1] in PACKED else endings[-1:]
    if kind == [".jsonl"]:
        return learnable(printable(path), _read_jsonl(path))
    separator = {".csv": ",", ".tsv": "\t"}.get(kind[0]) if kind else None
    return None if separator is None else _read_csv(path, separator)


def learnable(name: str, documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; in the end, a complaint if nothing in any of them is to be learned."""
    has_documents, learned = False, False
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
    with unpacked(path) as file:
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
                        yield document({column: value.as_py()}, f"{name}, row {number}")
    except (ArrowException, OSError) as error:
        came = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: expected a Parquet file, got: {came}; fetch it again") from None


def _read_csv(path: Path, separator: str) -> Iterator[Document]:
    """One document a row, its column `text`; the first row names the columns. Quoted text may have line ends."""
    name, size, column = printable(path), 0, None
    csv.field_size_limit(LINE)  # of the process, which reads no other tables; by default 131,072 characters

    def lines(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal size
        for number, line in enumerate(file, 1):
            size += len(line)
            if size > LINE:
                raise UserError(f"{name}, line {number}: expected at most {LINE:,} bytes in a row, got more; cut it")
            yield line.decode("utf-8" if number > 1 else "utf-8-sig", "surrogateescape")

    with unpacked(path) as file:
        table = csv.reader(lines(iter(partial(file.readline, LINE + 1), b"")), delimiter=separator, strict=True)
        try:
            for row in table:
                size, place = 0, f"{name}, line {table.line_num}"
                if column is None:
                    column = _text_column(row, name)
                elif column < len(row):
                    yield (Segment(row[column], True),)
                elif row:
                    raise UserError(f"{place}: expected at least {column + 1} fields, got {len(row)}; mend the row")
        except csv.Error as error:
            raise UserError(f"{name}, line {table.line_num}: expected a row of CSV, got: {error}; mend it") from None


def _text_column(names: list[str], name: str) -> int:
    if "text" in names:
        return names.index("text")
    came = ", ".join(printable(key[:80]) for key in names[:8]) or "an empty line"
    raise UserError(f"{name}: expected the column `text` in the first line, got {came}; rename one of them")


class _Bounded(BufferedReader):
    """A file of which no more than a document is read at a time, whatever size an archive's header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, if these are few enough."""
        if size is None or not 0 <= size <= LINE:
            raise tarfile.TarError(f"a part of {size:,} bytes, and {LINE:,} are the most")
        return super().read(size)


def _read_webdataset(path: Path) -> Iterator[Document]:
    """One document a sample, the files NAME.* of a tar archive: NAME.txt, or NAME.json as a line of JSON lines.

    Other files of a sample, pictures for example, are passed over. Nothing is unpacked onto the disk.
    """
    name = printable(path)
    try:
        with _Bounded(FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for key, members in groupby(_members(archive), key=lambda member: member[0]):
                fields = {kind: data for _, kind, data in members}
                place = f"{name}, sample {printable(key[:80])}"
                if "text" in fields:
                    yield (Segment(fields["text"].decode("utf-8", "surrogateescape"), True),)
                elif "json" in fields:
                    yield _parse(fields["json"], place, "utf-8")
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.TarError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: expected a WebDataset archive (.tar), got: {error}; fetch it again") from None


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yield (sample, kind, content) of each file that can be a document."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # or a million of them fill the memory
        folder, slash, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        kind = SAMPLE.get(ending.rpartition(".")[2].lower())
        if stem and kind and member.isreg() and not member.issparse():
            content = archive.extractfile(member)
            yield folder + slash + stem, kind, content.read() if content is not None else b""


def _parse(line: bytes, place: str, encoding: str) -> Document:
    try:
        record = json.loads(line.decode(encoding))
    except (ValueError, RecursionError) as error:
        came = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place}: expected a JSON object, got no JSON ({came})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object with `text` or `messages`, got {_kind(record)}")
    return document(record, place)


def document(record: Mapping[str, Any], place: str) -> Document:
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
