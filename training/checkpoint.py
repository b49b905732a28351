"""Checkpoints: a tree of tensors as safetensors plus JSON, whole or not there at all, bit for bit the same when loaded.

    RUN/checkpoints/step_000500/state.safetensors   every leaf under its dotted name: params.layers.moe.w2, step, ...
    RUN/checkpoints/step_000500/meta.json           format, step, model sizes, SHA-256 of the other file, version

A checkpoint is written into a hidden folder, flushed to the disk and renamed: whoever sees `step_000500` sees it whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import Tree, tree_map, unflatten, walk
from training.errors import UserError

FORMAT = 1  # raise it when an older program could not read what is written
STATE, META, ORDER = "state.safetensors", "meta.json", "leaves"
STEP_FOLDER = re.compile(r"step_(\d{6,})")
DRAFT = ".draft-"  # begins the names of folders that are being written or removed
MEND = "remove this step's folder to go on from the one before"


def save_checkpoint(
    folder: str | Path, state: Any, config_dict: Mapping[str, Any], *, keep: int, tokenizer: str = "bytes"
) -> Path:
    """Write `state` as the checkpoint of its step, then remove older ones beyond the newest `keep`.

    Args:
        folder: the run folder.
        state: nested dicts, NamedTuples or sequences of tensors, with a leaf `step` at the top.
        config_dict: the model's sizes, `dataclasses.asdict(model_config)`.
        keep: checkpoints to leave, this one included; later steps and folders of other names are never touched.
        tokenizer: fingerprint of the tokenizer that the parameters go with.

    Returns:
        The new folder. When anything fails, everything that was there before is still there and nothing else is.

    Raises:
        UserError: the disk refuses.
        ValueError: a leaf is no tensor, two leaves share a name, no leaf is called `step`, keep < 1.
    """
    tensors = _named_tensors(state)
    if "step" not in tensors or keep < 1:
        raise ValueError(f"save_checkpoint: expected a leaf `step` and keep >= 1, got {[*tensors][:3]} and {keep}")
    step = int(tensors["step"])
    home = Path(folder, "checkpoints")
    draft, target = home / f"{DRAFT}step_{step:06d}", home / f"step_{step:06d}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        _clean(home)
        _write(draft, tensors, step, {"model": dict(config_dict), "tokenizer": tokenizer})
        _publish(draft, target)
        for old in [path for at, path in _steps(home) if at < step][: -(keep - 1) or None]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target}: the disk refused it: {reason}; free space or choose another --out") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run folder; None when there is none. Unfinished ones do not count."""
    steps = _steps(Path(folder, "checkpoints"))
    return steps[-1][1] if steps else None


def load_checkpoint(path: str | Path, like: Any = None) -> Any:
    """The state in a checkpoint, bit for bit.

    Args:
        path: a `step_NNNNNN` folder, or a run folder, which means its latest checkpoint.
        like: a state of the same structure, shapes and dtypes, as `init_state` makes it. The result has its types
            and devices; without it the result is nested dicts on the CPU.

    Raises:
        UserError: a file is missing or damaged, of an unknown format, or holds another model than `like`.
    """
    folder = _locate(path)
    _read_meta(folder)
    flat = _read_tensors(folder, "")
    return unflatten(flat) if like is None else _restore(folder / STATE, flat, like)


def load_params(path: str | Path) -> tuple[Tree, ModelConfig]:
    """The parameters, on the CPU, and the sizes of the model in a checkpoint or in a run folder's latest one.

    Raises:
        UserError: as `load_checkpoint`, or the sizes in meta.json are none of a model.
    """
    folder = _locate(path)
    meta = _read_meta(folder)
    try:
        config = ModelConfig(**meta["model"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / META}: expected the sizes of a model, got: {error}; {MEND}") from None
    return unflatten(_read_tensors(folder, "params."))["params"], config


def checkpoint_tokenizer(path: str | Path) -> str:
    """The fingerprint of the tokenizer that a checkpoint, or a run folder's latest one, goes with.

    Raises:
        UserError: as `load_checkpoint`.
    """
    return str(_read_meta(_locate(path)).get("tokenizer", "bytes"))


# Writing --------------------------------------------------------------------------------------------------------------


def _named_tensors(state: Any) -> dict[str, Tensor]:
    """Dotted name -> a contiguous copy on the CPU; safetensors refuses views and shared memory."""
    tensors: dict[str, Tensor] = {}
    for name, leaf in walk(state):
        if not isinstance(leaf, Tensor) or name in tensors:
            raise ValueError(f"save_checkpoint: expected one tensor called {name}, got {type(leaf).__name__}")
        tensors[name] = leaf.detach().cpu().contiguous().clone()
    return tensors


def _write(draft: Path, tensors: dict[str, Tensor], step: int, about: Mapping[str, Any]) -> None:
    draft.mkdir()
    save_file(tensors, draft / STATE, metadata={ORDER: json.dumps([*tensors])})  # the file itself sorts its names
    meta = {
        "format": FORMAT,
        "step": step,
        **about,
        "sha256": _sha256(draft / STATE),
        "version": _version(),
    }
    (draft / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in (draft / STATE, draft / META, draft):
        _flush(path)


def _publish(draft: Path, target: Path) -> None:
    """Rename the draft; a checkpoint of the same step steps aside first, and comes back when the renaming fails."""
    aside = target.with_name(f"{DRAFT}old-{target.name}")
    replaces = target.exists()
    if replaces:
        os.replace(target, aside)
    try:
        os.replace(draft, target)
    except BaseException:
        if replaces:
            aside.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Out of sight first: a removal that is cut short leaves no half checkpoint."""
    hidden = folder.with_name(f"{DRAFT}old-{folder.name}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _clean(home: Path) -> None:
    """Remove what a killed process left."""
    for leftover in home.glob(f"{DRAFT}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version() -> str:
    try:
        return metadata.version("tiny-onn-func")
    except metadata.PackageNotFoundError:
        return "not installed"


# Reading --------------------------------------------------------------------------------------------------------------


def _steps(home: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, in the order of steps."""
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in home.iterdir()] if home.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _locate(path: str | Path) -> Path:
    if (Path(path) / META).exists() or (Path(path) / STATE).exists():
        return Path(path)
    latest = latest_checkpoint(path)
    if latest is None:
        raise UserError(f"{path}: expected a run folder with checkpoints/step_NNNNNN in it, or one of those; got none")
    return latest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, after a check of everything in it and of the other file's checksum."""
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        actual = _sha256(folder / STATE)
    except OSError as error:
        raise UserError(f"{error.filename}: expected a file of a checkpoint, got: {error.strerror}; {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got: {error}; {MEND}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        came = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise UserError(f"{path}: expected format {FORMAT}, got {came!r}; load it with the version that wrote it")
    if not isinstance(meta.get("model"), dict):
        raise UserError(f"{path}: expected the key model with the model's sizes, got none; {MEND}")
    if meta.get("sha256") != actual:
        raise UserError(f"{folder / STATE}: expected SHA-256 {meta.get('sha256')}, got {actual}: damaged; {MEND}")
    return meta


def _read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The leaves whose names begin with `prefix`, in the order of the state; copies: the file may be removed."""
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            order = json.loads((file.metadata() or {}).get(ORDER, "[]"))
            flat = {name: file.get_tensor(name).clone() for name in order if name.startswith(prefix)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / STATE}: expected safetensors, got: {error}; {MEND}") from None
    if not flat:
        raise UserError(f"{folder / STATE}: expected tensors called {prefix}*, got none; {MEND}")
    return flat


def _restore(path: Path, flat: dict[str, Tensor], like: Any) -> Any:
    """The leaves in the structure of `like`."""
    wanted = dict(walk(like))
    advice = "use the sizes in the run's own config.yaml"
    for name in sorted(wanted.keys() ^ flat.keys()):
        states = ("a tensor", "none") if name in wanted else ("no tensor", "one")
        raise UserError(f"{path}: expected {states[0]} called {name}, got {states[1]}; {advice}")
    for name, leaf in wanted.items():
        came = flat[name]
        if (came.shape, came.dtype) != (leaf.shape, leaf.dtype):
            shapes = f"{tuple(leaf.shape)} {leaf.dtype}, got {tuple(came.shape)} {came.dtype}"
            raise UserError(f"{path}: {name}: expected {shapes}; {advice}")
    values = iter([flat[name].to(leaf.device) for name, leaf in wanted.items()])
    return tree_map(lambda _: next(values), like)
