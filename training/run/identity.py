"""Fingerprints that a resumed run, and every rank of a run, must match: settings, text, code."""

import hashlib
from collections.abc import Mapping
from importlib import import_module  # noqa: TID251 - of PACKAGES alone
from pathlib import Path
from typing import Any

import torch

from tiny_onn_func.tree import flatten
from training.data.corpus import Splits, fingerprint
from training.errors import UserError
from training.run.config import RunConfig, plain_values
from training.storage.checkpoint_files import version
from training.storage.plain_yaml import shown

# What may change when a run goes on: where things are, what is watched, how far it goes, what bad numbers do.
FREE = {
    "data", "tokenizer", "out", "init", "teacher", "teacher_cache", "steps", "eval_every", "eval_bytes", "stop_when",
    "final_eval_bytes", "checkpoint_every", "keep_checkpoints", "on_nonfinite", "picture_every", "sample_tokens",
    "prompt", "log", "router_init", "threads", "device", "shard_optimizer", "shard_experts", "accumulate",
}  # fmt: skip
ELSEWHERE = (  # may differ between processes: where things are on a machine
    "data",
    "init",
    "router_init",
    "teacher_cache",
    "threads",
    "device",
)
PACKAGES = ("tiny_onn_func", "training")


def deciding(config: RunConfig, corpus: Splits) -> dict[str, Any]:
    """Dotted key -> value of all settings that decide the numbers of a run, and the text's fingerprint."""
    settings = flatten(plain_values(config))
    return {"text": fingerprint(corpus)} | {key: value for key, value in settings.items() if key not in FREE}


def check_same(now: Mapping[str, Any], before: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse to resume where a setting or the text differs.

    Raises:
        UserError: one line with every difference.
    """
    changed = [key for key in sorted(now.keys() & before.keys()) if now[key] != before[key]]
    said = ["another text" if key == "text" else f"{key} {shown(now[key])} for {shown(before[key])}" for key in changed]
    if said:
        raise UserError(
            f"--resume: expected the settings and the text that {folder} began with, got {', '.join(said)}; "
            "go on with those, or name a new --out"
        )


def facts_of(config: RunConfig, resume: bool) -> dict[str, Any]:
    """Facts that every rank of a run must share: settings, versions, and a hash of the program's files."""
    flat = {key: value for key, value in flatten(plain_values(config)).items() if key not in ELSEWHERE}
    versions = {"torch": torch.__version__, "tiny-onn-func": version(), "the program's files": _sources()}
    return flat | versions | {"--resume": resume}


def _sources() -> str:
    """Hash of the files of both packages."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        home = Path(str(import_module(package).__file__)).parent
        for path in sorted(home.rglob("*.py")):  # sub-packages too: ranks whose code differs must not pass for alike
            digest.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
