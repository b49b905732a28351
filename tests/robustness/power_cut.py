"""What a disk holds when the power goes: files with content, folders with names, each durable only once it was flushed.

The model is strict: a name is there when its folder was flushed after it was made, renamed or removed; content when its
file was. `names_stay` is the other bad end: all names are there, with the content that was durable.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

HEAD = struct.Struct("=4I")


class Operation(NamedTuple):
    """A call that changed files: O open, T open and truncate, W write, R rename, S flush, L set length, M, U."""

    kind: str
    path: str
    other: str
    data: bytes


class File:
    """Content, as written and as durable."""

    def __init__(self) -> None:
        self.now = b""
        self.durable = b""


class Folder:
    """Names, as made and as durable; a folder that is renamed takes both along."""

    def __init__(self) -> None:
        self.now: dict[str, File | Folder] = {}
        self.durable: dict[str, File | Folder] = {}


def read_log(path: Path) -> list[Operation]:
    """The operations that tests/robustness/fault_shim.c wrote."""
    data, at, operations = path.read_bytes(), 0, []
    while at < len(data):
        kind, first_size, other_size, content_size = HEAD.unpack_from(data, at)
        at += HEAD.size
        first, other, content = (
            data[at : at + first_size],
            data[at + first_size : at + first_size + other_size],
            data[at + first_size + other_size :][:content_size],
        )
        at += first_size + other_size + content_size
        operations.append(Operation(chr(kind), first.decode(), other.decode(), content))
    return operations


def cut_before(operations: list[Operation], at: int, disk: Path, *, names_stay: bool) -> None:
    """Put below `disk`, which is there and empty, what is left when the power goes before operation `at`."""
    root = Folder()
    for operation in operations[:at]:
        _apply(operation, root, str(disk))
    _restore(root, disk, names_stay)


def _restore(folder: Folder, path: Path, names_stay: bool) -> None:
    for name, node in (folder.now if names_stay else folder.durable).items():
        if isinstance(node, Folder):
            (path / name).mkdir()
            _restore(node, path / name, names_stay)
        else:
            (path / name).write_bytes(node.durable)


def _apply(operation: Operation, root: Folder, disk: str) -> None:
    kind, path, other, data = operation
    parent, name = _place(root, disk, path)
    node = parent.now.get(name)
    if kind in "OTW":
        file = node if isinstance(node, File) else parent.now.setdefault(name, File())  # a draft of safetensors is
        assert isinstance(file, File)  # made past the C library
        file.now = (b"" if kind == "T" else file.now) + data  # every file here is written from begin to end
    elif kind == "L":
        assert isinstance(node, File)
        node.now = node.now[: int.from_bytes(data, "little")]
    elif kind == "M":
        parent.now[name] = Folder()
    elif kind == "U":
        parent.now.pop(name, None)
    elif kind == "R":
        goal, new_name = _place(root, disk, other)
        goal.now[new_name] = parent.now.pop(name)
    elif kind == "S":
        _flush(root if path == disk else node or _renamed_draft(parent, name))
    else:
        raise AssertionError(f"{path}: written in a way that this model does not know")


def _place(root: Folder, disk: str, path: str) -> tuple[Folder, str]:
    """The folder of a path, and its name in it."""
    *parents, name = os.path.relpath(path, disk).split(os.sep)
    for part in parents:
        inner = root.now[part]
        assert isinstance(inner, Folder), path
        root = inner
    return root, name


def _renamed_draft(folder: Folder, name: str) -> File | Folder:
    """safetensors renames its draft past the C library, too."""
    (draft,) = (draft for draft in folder.now if draft.startswith(".tmp"))
    folder.now[name] = folder.now.pop(draft)
    return folder.now[name]


def _flush(node: File | Folder) -> None:
    if isinstance(node, File):
        node.durable = node.now
    else:
        node.durable = dict(node.now)
