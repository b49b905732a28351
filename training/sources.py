"""Sources of text: what `--data` names -> files -> documents, one in memory at a time.

| spec     | files                                                                  | a document       |
|----------|------------------------------------------------------------------------|------------------|
| `stdlib` | modules of the Python standard library that runs this, without tests   | a module         |
| a file   | that file                                                              | the file, or     |
| a folder | all below it but hidden names, links to folders and binary files       | a line where the |
| a glob   | the files that match; `**` stands for all folders below                | file is `.jsonl` |

Text is UTF-8. A byte that is no UTF-8 is kept as it is: it travels as a lone surrogate (Python's `surrogateescape`) and
is that byte again when encoded. So files in Latin-1 work, and no byte is lost. A file with NUL bytes is no text.
"""

import glob
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from training.errors import UserError

NO_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NO_PARQUET = 'Parquet is not supported yet; write its rows as .jsonl, one {"text": ...} a line'


class Segment(NamedTuple):
    """A stretch of text that is learned (`is_target`) or is only context."""

    text: str
    is_target: bool


Document = tuple[Segment, ...]


class Source(NamedTuple):
    """The files behind a spec, in the order in which they are read, and how to read one of them."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[Path], Iterable[Document]]


def find_source(spec: str) -> Source:
    """The files that a spec names; a file called `stdlib` is `./stdlib`, a file that exists is never taken for a glob.

    Raises:
        UserError: nothing there, nothing that is text, or nothing that may be read.
    """
    if spec == "stdlib":
        return Source(spec, _stdlib_files(), _read_module)
    path, name = Path(os.path.expanduser(spec)), printable(spec)
    try:
        if path.suffix.lower() == ".parquet":
            raise UserError(f"{name}: {NO_PARQUET}")
        if spec and path.is_dir():
            if path.suffix.lower() == ".jsonl":
                raise UserError(f"{name}: expected a .jsonl file, got a folder; name a file in it, or {name}/*")
            return Source(name, _files_below(path), _read_member)
        if spec and path.exists():
            return Source(name, (path,), _read_file)
        matches = [Path(match) for match in sorted({*glob.glob(str(path), recursive=True)})]
    except OSError as error:
        refuse(name, error)
    if files := tuple(match for match in matches if not match.is_dir()):
        return Source(name, files, _read_file)
    if glob.has_magic(spec):
        came = "folders only" if matches else "no match"
        raise UserError(f"{name}: expected a glob that matches files, got {came}; ** stands for all folders below")
    raise UserError(f"{name or repr(name)}: expected stdlib, a file, a folder or a glob, got no such thing; check it")


def documents(source: Source) -> Iterator[Document]:
    """The documents of a source, in order; those without any text are left out.

    Raises:
        UserError: a file that cannot be read, is binary, or has a line that is no JSON object of the known kinds;
            no text in any of the files.
    """
    found = False
    for file in source.files:
        try:
            for document in source.read(file):
                if any(part.text for part in document):
                    found = True
                    yield document
        except OSError as error:
            refuse(printable(file), error)
    if not found:
        sizes = [file.stat().st_size for file in source.files]
        came = "an empty file" if sizes == [0] else f"none in {len(sizes)} file(s)"
        raise UserError(f"{source.name}: expected text, got {came}; name a file or folder that has some")


def chat_document(messages: Iterable[tuple[str, str]]) -> Document:
    """(role, content) turns as plain text, each one `<|role|>` newline `content` `<|end|>` newline.

    Learned are the content and the end of the assistant's turns; all else is context. The marks are ordinary text, so
    every tokenizer can write them (and a content that spells them cannot be told from them).
    """
    parts: list[Segment] = []
    for role, content in messages:
        parts += [Segment(f"<|{role}|>\n", False), Segment(f"{content}<|end|>\n", role == "assistant")]
    return tuple(parts)


def printable(name: str | Path) -> str:
    """A file's name on one line."""
    return str(name) if str(name).isprintable() else repr(str(name))


def refuse(name: str, error: Exception) -> NoReturn:
    """The one line about a file that the system does not hand out."""
    raise UserError(f"{name}: expected a file that can be read, got: {getattr(error, 'strerror', None) or error}")


# Files ----------------------------------------------------------------------------------------------------------------


def _stdlib_files() -> tuple[Path, ...]:
    """Modules that belong to CPython on every platform, by their path below the library's folder, wherever that is."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [file.relative_to(root) for file in _walk(root, NO_MODULES) if file.suffix == ".py"]
    names = sys.stdlib_module_names  # the same on all platforms: no sitecustomize, no file that a build made
    kept = [file for file in found if file.parts[0].removesuffix(".py") in names]
    if not kept:
        raise UserError(f"stdlib: expected Python source files in {root}, got none; give a file or a folder as --data")
    return tuple(root / file for file in sorted(kept, key=Path.as_posix))


def _files_below(root: Path) -> tuple[Path, ...]:
    return tuple(sorted(_walk(root), key=lambda file: file.relative_to(root).as_posix()))


def _walk(root: Path, passed_over: Collection[str] = ()) -> Iterator[Path]:
    """Regular files below a folder, in no order; not entered: hidden, linked and `passed_over` folders."""
    for folder, folders, names in os.walk(root, onerror=_reraise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in passed_over]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())  # a pipe would block, a link may lead nowhere


def _reraise(error: OSError) -> NoReturn:
    refuse(printable(str(error.filename)), error)


# Text -----------------------------------------------------------------------------------------------------------------


def _read_module(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    yield (Segment(text.replace("\r\n", "\n"), True),)  # line ends differ between platforms, the text does not


def _read_member(path: Path) -> Iterator[Document]:
    """A file of a folder: like a file that is named, but binary ones are passed over."""
    if path.suffix.lower() == ".jsonl":
        yield from _read_jsonl(path)
    elif "\0" not in (text := _text(path)):
        yield (Segment(text, True),)


def _read_file(path: Path) -> Iterator[Document]:
    name, suffix = printable(path), path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{name}: expected a regular file, got a pipe or a device; save it to a file first")
    if suffix == ".parquet":
        raise UserError(f"{name}: {NO_PARQUET}")
    if suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif "\0" in (text := _text(path)):
        raise UserError(f"{name}: expected a text file, got a binary one (it has NUL bytes); save its text as UTF-8")
    else:
        yield (Segment(text, True),)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


# JSON lines -----------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[Document]:
    """One document a line: {"text": ...} or {"messages": [{"role": ..., "content": ...}, ...]}; blank lines are none.

    A line with both is a chat. Other keys are of no interest.
    """
    found, learned, name = False, False, printable(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                document = _parse(line, f"{name}, line {number}", "utf-8" if number > 1 else "utf-8-sig")
                found, learned = True, learned or any(part.is_target for part in document)
                yield document
    if found and not learned:
        raise UserError(
            f"{name}: expected chats with assistant turns (only those are learned), got none; "
            'name that role "assistant"'
        )


def _parse(line: bytes, place: str, encoding: str) -> Document:
    try:
        record = json.loads(line.decode(encoding))
    except (ValueError, RecursionError) as error:
        came = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place}: expected a JSON object, got no JSON ({came})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object with `text` or `messages`, got {_kind(record)}")
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
    empty = "an empty list" if value == [] else None
    return empty or kinds.get(type(value), "a number")
