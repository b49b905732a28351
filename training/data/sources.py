"""Sources of text: a `--data` spec -> files -> documents, one in memory at a time.

| spec     | files                                                                  | a document       |
|----------|------------------------------------------------------------------------|------------------|
| `stdlib` | modules of the Python standard library that runs this, without tests   | a module         |
| `stdlib:`| those of them that a glob below the library's folder names, such as    | a module         |
|          | `stdlib:email/*.py`; `**` stands for all folders below                 |                  |
| a file   | that file                                                              | the file, or     |
| a folder | all below it but hidden names, links to folders and binary files       | a line where the |
| a glob   | the files that match; `**` stands for all folders below                | file is `.jsonl`,|
|          |                                                                        | a row: `.parquet`|
|          |                                                                        | `.csv`, `.tsv`, a|
|          |                                                                        | sample: `.tar`   |
| `hf:NAME`| a data set of the Hugging Face Hub (`training.data.hub`)               | a row            |

A row of a table is its column `text`, of a Parquet file or a data set also `messages`. What ends in `.gz` or `.zst`
(`.txt.gz`, `.jsonl.zst`) is unpacked as it is read. Lines and rows are read one by one, row group by row group, and a
long text piece by piece, so a file may be larger than memory.

Text is UTF-8. A byte that is no UTF-8 is kept as it is: it travels as a lone surrogate (Python's `surrogateescape`) and
is that byte again when encoded. So files in Latin-1 work, and no byte is lost. A file with NUL bytes is no text.
"""

import glob
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from training.data.hub import PREFIX, HubRows, find_hub
from training.data.readers import Document, Segment, printable, refuse, text_document
from training.data.rows import rows
from training.errors import UserError

NO_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
STDLIB = "stdlib"


class Source(NamedTuple):
    """The files behind a spec, in the order in which they are read, and how to read one of them; or a data set."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[Path], Iterable[Document]]
    hub: HubRows | None = None


def find_source(spec: str) -> Source:
    """The files that a spec names; a file that exists is never taken for a glob.

    A file called `stdlib` is `./stdlib`, and `./stdlib:a` is one called `stdlib:a`. What begins with `hf:` is a data
    set, unless there is a file of that name.

    Raises:
        UserError: nothing there, nothing that is text, or nothing that may be read.
    """
    if spec == STDLIB or spec.startswith(f"{STDLIB}:"):
        pattern = spec.partition(":")[2] if ":" in spec else "**"
        return Source(printable(spec), _stdlib_files(pattern, printable(spec)), _read_module)
    path, name = Path(os.path.expanduser(spec)), printable(spec)
    if spec.startswith(PREFIX) and not os.path.exists(spec.replace("\0", "")):
        return Source(name, (), _read_file, find_hub(spec))
    try:
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
    has_text = False
    for document in _all_documents(source):
        if any(part.text or part.role is not None for part in document):
            has_text = True
            yield document
    if not has_text:
        if source.hub is not None:
            raise UserError(f"{source.name}: expected text, got none in its rows; name a split that has some")
        sizes = [file.stat().st_size for file in source.files]
        came = "an empty file" if sizes == [0] else f"none in {len(sizes)} file(s)"
        raise UserError(f"{source.name}: expected text, got {came}; name a file or folder that has some")


def _all_documents(source: Source) -> Iterator[Document]:
    if source.hub is not None:
        yield from source.hub
    for file in source.files:
        try:
            yield from source.read(file)
        except (OSError, EOFError, zlib.error) as error:  # the last two: packed data that is cut short or damaged
            refuse(printable(file), error)


# One file; the names of these three are a part of the cache's keys ---------------------------------------------------


def _read_module(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    yield (Segment(text.replace("\r\n", "\n"), True),)  # line ends differ between platforms, the text does not


def _read_member(path: Path) -> Iterator[Document]:
    """A file of a folder: like a file that is named, but binary ones are passed over."""
    if (documents := rows(path)) is not None:
        yield from documents
    elif (text := text_document(path)) is not None:
        yield text


def _read_file(path: Path) -> Iterator[Document]:
    name = printable(path)
    if not path.is_file():
        raise UserError(f"{name}: expected a regular file, got a pipe or a device; save it to a file first")
    if (documents := rows(path)) is not None:
        yield from documents
    elif (text := text_document(path)) is None:
        raise UserError(f"{name}: expected a text file, got a binary one (it has NUL bytes); save its text as UTF-8")
    else:
        yield text


# Files ----------------------------------------------------------------------------------------------------------------


def _stdlib_files(pattern: str, name: str) -> tuple[Path, ...]:
    """Modules that belong to CPython on every platform, by their path below the library's folder, wherever that is."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [file.relative_to(root) for file in _walk(root, NO_MODULES) if file.suffix == ".py"]
    names = sys.stdlib_module_names  # the same on all platforms: no sitecustomize, no file that a build made
    kept = [file for file in modules if file.parts[0].removesuffix(".py") in names]
    if not kept:
        raise UserError(f"stdlib: expected Python source files in {root}, got none; give a file or a folder as --data")
    chosen = [file for file in kept if _matches(file.parts, pattern.split("/"))]
    if not chosen:
        wanted = "that matches modules of the standard library"
        outside = pattern.startswith(("/", "~")) or ".." in pattern.split("/") or "\\" in pattern or ":" in pattern
        wanted = "below the standard library's folder" if outside else wanted
        raise UserError(f"{name}: expected a glob {wanted}, got {pattern!r}; such as stdlib:email/*.py")
    return tuple(root / file for file in sorted(chosen, key=Path.as_posix))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """True if a glob's parts, of which `**` is any number of folders, match a path; the same on all systems."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts[1:], pattern) or _matches(parts, pattern[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


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
