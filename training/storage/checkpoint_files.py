"""The files of a checkpoint: written under a hidden name, flushed, renamed; read only after their checksums are right.

step_000500/state.safetensors   every leaf under its dotted name: params.layers.moe.w2, step, ...
step_000500/meta.json           format, step, sizes, settings, SHA-256 of the other file and of this one's rest
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import UserError
from training.storage.atomic import flush, make_folder
from training.storage.regular_file import open_regular, read_small

FORMAT = 1  # raise it when an older program could not read what is written
STATE, META, ORDER = "state.safetensors", "meta.json", "leaves"
STEP_FOLDER = re.compile(r"step_(\d{6,})")
DRAFT = ".draft-"  # begins the names of folders that are being written or removed
MOST_META, DEEPEST = 1 << 24, 32  # bytes of meta.json, dots in a leaf's name
MEND = "remove this step's folder to go on from the one before"
ALONE = "none is whole: remove the folder checkpoints, and --resume begins anew"


class Damaged(UserError):
    """Error: the files of a checkpoint are damaged; another checkpoint of the run may be whole."""


def publish_step(home: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write `step_NNNNNN` into `home`, whole or not at all; a former one of that step stays until then.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    make_folder(home)
    clean(home)
    draft, target = home / f"{DRAFT}step_{step:06d}", home / f"step_{step:06d}"
    try:
        _write(draft, tensors, step, about)
        publish(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def remove_steps(folders: Iterable[Path]) -> None:
    """Each out of sight first: a removal that is cut short leaves no half checkpoint."""
    for folder in folders:
        hidden = folder.with_name(f"{DRAFT}old-{folder.name}")
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def clean(home: Path) -> None:
    """Remove what a killed process left; a checkpoint that stepped aside for one that never came comes back."""
    for leftover in home.glob(f"{DRAFT}*"):
        target = home / leftover.name.removeprefix(f"{DRAFT}aside-")
        if leftover.name.startswith(f"{DRAFT}aside-") and not target.exists():
            os.replace(leftover, target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def steps_in(home: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, in the order of steps."""
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in home.iterdir()] if home.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def read_meta(folder: Path, files: Iterable[str] = (STATE,), wanted: int = FORMAT) -> dict[str, Any]:
    """meta.json, after a check of everything in it and of all checksums.

    Args:
        files: names of the files that the checkpoint is made of, beside meta.json.
        wanted: format that this program reads.

    Raises:
        Damaged: a file is missing or not what was written.
        UserError: another version of the program wrote it.
    """
    path = folder / META
    try:
        meta = json.loads(read_small(path, MOST_META))
        actual = {name: sha256(folder / name) for name in files}
    except OSError as error:
        raise Damaged(f"{error.filename}: expected a file of a checkpoint, got: {error.strerror}; {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: expected JSON, got: {error}; {MEND}") from None
    if not isinstance(meta, dict):
        raise Damaged(f"{path}: expected keys and values, got {type(meta).__name__}; {MEND}")
    if meta.get("format") != wanted:
        ours, theirs = f"format {wanted} of version {version()}", f"{meta.get('format')!r} of {meta.get('version')!r}"
        raise UserError(f"{path}: expected {ours}, got {theirs}; load it with the version that wrote it")
    if meta.pop("checksum", None) != digest(meta):
        raise Damaged(f"{path}: expected the checksum of its content, got another: damaged; {MEND}")
    if not isinstance(meta.get("model"), dict):
        raise Damaged(f"{path}: expected the key model with the model's sizes, got none; {MEND}")
    named = STEP_FOLDER.fullmatch(folder.name)  # a copy under another name is welcome
    if not isinstance(meta.get("step"), int) or (named and int(named[1]) != meta["step"]):
        raise Damaged(f"{path}: expected the step of the folder's name, got {meta.get('step')!r}; {MEND}")
    written = meta.get("sha256")
    said = written if isinstance(written, dict) else {STATE: written}
    for name in sorted(said.keys() | actual.keys()):
        wants, came = said.get(name), actual.get(name)
        if wants != came:
            raise Damaged(f"{folder / name}: expected SHA-256 {wants}, got {came or 'no file'}: damaged; {MEND}")
    return meta


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The leaves whose names begin with `prefix`, in the order of the state; copies: the file may be removed."""
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            order = [str(name) for name in json.loads((file.metadata() or {}).get(ORDER, "[]"))]
            flat = {name: file.get_tensor(name).clone() for name in order if name.startswith(prefix)}
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{folder / STATE}: expected safetensors, got: {error}; {MEND}") from None
    paths = [name.split(".") for name in flat if name.count(".") <= DEEPEST]
    inner = {".".join(path[:end]) for path in paths for end in range(1, len(path))}
    if len(paths) < len(flat) or inner & flat.keys():
        raise Damaged(f"{folder / STATE}: expected names of leaves, got one below another, or too deep; {MEND}")
    if not flat:
        raise Damaged(f"{folder / STATE}: expected tensors called {prefix}*, got none; {MEND}")
    return flat


def version() -> str:
    """Of this program, as installed."""
    try:
        return metadata.version("tiny-onn-func")
    except metadata.PackageNotFoundError:
        return "not installed"


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the values of a meta.json without its own checksum."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write(draft: Path, tensors: Mapping[str, Tensor], step: int, about: Mapping[str, Any]) -> None:
    draft.mkdir()
    save_file(dict(tensors), draft / STATE, metadata={ORDER: json.dumps([*tensors])})  # the file itself sorts its names
    write_meta(draft, {"format": FORMAT, "step": step, **about, "sha256": sha256(draft / STATE)})


def write_meta(draft: Path, meta: dict[str, Any]) -> None:
    """Write meta.json with its own checksum, and wait until everything in the folder is on the disk."""
    meta |= {"version": version()}
    meta["checksum"] = digest(json.loads(json.dumps(meta)))
    (draft / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in (*sorted(draft.iterdir(), reverse=True), draft):
        flush(path)


def publish(draft: Path, target: Path) -> None:
    """Rename the draft; a checkpoint of the same step steps aside first, and comes back when the renaming fails."""
    aside = target.with_name(f"{DRAFT}aside-{target.name}")
    replaces = target.exists()
    if replaces:
        os.replace(target, aside)
    try:
        os.replace(draft, target)
    except BaseException:
        if replaces:
            aside.rename(target)
        raise
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
