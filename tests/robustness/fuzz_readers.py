"""What reads files that nobody vouches for, each with files that are right: tests/robustness/fuzz.py spoils those."""

import csv
import gzip
import json
import os
import shutil
import sys
import tarfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch

from tests.robustness.fault_subjects import SIZES, TEXT
from training.storage.plain_yaml import write_yaml
from training.storage.regular_file import read_small

STUDY_FILES = [
    "study.yaml", "results.csv", "analysis.json", "runs/plain-seed0/metrics.jsonl", "runs/plain-seed0/summary.json",
]  # fmt: skip
STEP = "checkpoints/step_000003"


class Reader(NamedTuple):
    """What reads, and the files that it reads."""

    read: Callable[[Path], object]  # given a folder that holds the files
    folder: Path  # with what is right
    targets: list[str]  # of these one is spoilt


def readers(home: Path) -> dict[str, Reader]:
    """Name -> reader, with right files made below `home`."""
    from tiny_onn_func.huggingface.pretrained import load_pretrained
    from training.cli import main
    from training.commands.export import export_run
    from training.data.hf_tokenizer import open_tokenizer
    from training.data.train_tokenizer import train_tokenizer
    from training.run.finished import open_run
    from training.run.settings import load_settings, parse_train_args
    from training.storage.checkpoint import load_checkpoint
    from training.storage.recorder import read_history
    from training.study.file import load_study
    from training.study.report import write_report

    texts = home / "texts"
    texts.mkdir()
    (texts / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = [{"text": f"{i}: {line}"} for i, line in enumerate(TEXT.splitlines()[:20])]
    chat = [
        {"messages": [{"role": "user", "content": f"router {i}?"}, {"role": "assistant", "content": row["text"]}]}
        for i, row in enumerate(rows)
    ]
    (texts / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (texts / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)), encoding="utf-8")
    (texts / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    with tarfile.open(texts / "shard.tar", "w") as archive:
        archive.add(texts / "text.txt", "a/0.txt")
        archive.add(texts / "text.txt", "a/1.txt")
    with (texts / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([row["text"][:1], row["text"]] for row in rows)])
    run, study = home / "run", home / "study"
    flags = [f"--model.{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    few = [
        "--config=small_qwen3",
        "--steps=3",
        "--batch-size=2",
        "--sequence-length=16",
        "--eval-every=2",
        "--final-eval-bytes=60",
    ]
    _quietly(main, ["train", f"--data={texts / 'text.txt'}", f"--out={run}", "--sample-tokens=0", *few, *flags])
    base = {"data": str(texts / "text.txt"), "steps": 3, "batch_size": 2, "sequence_length": 16, "model": SIZES}
    plan = {
        "question": "Is it read?", "margin": 0.02, "falsifier": "It is not.", "baseline": "plain", "seeds": [0, 1],
        "base": base | {"final_eval_bytes": 60, "eval_every": 0},
        "arms": [{"name": "plain"}, {"name": "quick", "set": {"hyper.lr": 0.01}}],
    }  # fmt: skip
    (home / "plan").mkdir()
    write_yaml(plan, home / "plan" / "study.yaml")
    _quietly(main, ["study", str(home / "plan" / "study.yaml"), f"--out={study}"])
    tokenizer = home / "tokenizer"
    train_tokenizer(str(texts / "text.txt"), str(tokenizer), 300, holdout=0.1, split="auto")
    export_run(run, home / "hf", num_experts_per_tok=None)
    (home / "flags").mkdir()
    (home / "flags" / "flags.json").write_text(json.dumps(["--steps", "10", "--hyper.lr=1e-3", "--seed", "4"]))
    return {
        "configuration": Reader(lambda at: load_settings(str(at / "config.yaml")), run, ["config.yaml"]),
        "flags": Reader(lambda at: parse_train_args(_words(at / "flags.json")), home / "flags", ["flags.json"]),
        "study file": Reader(lambda at: load_study(at / "study.yaml"), home / "plan", ["study.yaml"]),
        "text": Reader(partial(_open_text, "text.txt"), texts, ["text.txt"]),
        "text, compressed": Reader(partial(_open_text, "text.txt.gz"), texts, ["text.txt.gz"]),
        "rows": Reader(partial(_open_text, "rows.jsonl"), texts, ["rows.jsonl"]),
        "table": Reader(partial(_open_text, "table.csv"), texts, ["table.csv"]),
        "archive": Reader(partial(_open_text, "shard.tar"), texts, ["shard.tar"]),
        "chats": Reader(partial(_open_text, "chat.jsonl"), texts, ["chat.jsonl"]),
        "checkpoint": Reader(partial(_load_same, run), run, [f"{STEP}/meta.json", f"{STEP}/state.safetensors"]),
        "checkpoints of a run": Reader(load_checkpoint, run, [f"{STEP}/meta.json", f"{STEP}/state.safetensors"]),
        "checkpoint, checksums right": Reader(
            _load_signed, run, [f"{STEP}/meta.json", f"{STEP}/state.safetensors", f"{STEP}/state.safetensors"]
        ),
        **_shards(run, home / "sharded run"),
        "run folder": Reader(open_run, run, ["config.yaml", f"{STEP}/meta.json"]),
        "records": Reader(read_history, run, ["metrics.jsonl"]),
        "doctor": Reader(
            _examined, run, ["config.yaml", "metrics.jsonl", f"{STEP}/meta.json", f"{STEP}/state.safetensors"]
        ),
        "tokenizer": Reader(open_tokenizer, tokenizer, ["tokenizer.json"]),
        "Hugging Face folder": Reader(load_pretrained, home / "hf", ["config.json", "model.safetensors"]),
        "Hugging Face shards": Reader(
            load_pretrained, _sharded(home / "hf", home / "shards"), ["model.safetensors.index.json"]
        ),
        "plan of a study": Reader(_load_plan, study, ["study.yaml", "checkpoints/plan.json"]),
        **_parquet(texts, rows),
        "report of a run": Reader(write_report, run, ["config.yaml", "metrics.jsonl", "summary.json"]),
        "report of a study": Reader(write_report, study, STUDY_FILES),
    }  # fmt: skip


def _open_text(name: str, folder: Path) -> object:
    from training.data.corpus import open_corpus

    return open_corpus(str(folder / name), sequence_length=16, cache_dir=folder / "cache")


def _load_plan(folder: Path) -> object:
    from training.study.config import expand
    from training.study.file import load_study
    from training.study.plan import load_plan

    return load_plan(expand(load_study(folder / "study.yaml")), folder / "checkpoints")


def _parquet(texts: Path, rows: list[dict[str, str]]) -> dict[str, Reader]:
    """Where pyarrow is there."""
    try:
        from pyarrow import CompressedOutputStream, Table, parquet
    except ImportError:
        return {}
    parquet.write_table(Table.from_pylist(rows), texts / "rows.parquet")
    with CompressedOutputStream(str(texts / "text.txt.zst"), "zstd") as file:
        file.write(TEXT.encode())
    return {
        "Parquet": Reader(partial(_open_text, "rows.parquet"), texts, ["rows.parquet"]),
        "text, zst": Reader(partial(_open_text, "text.txt.zst"), texts, ["text.txt.zst"]),
    }


def _words(path: Path) -> list[str]:
    try:
        values = json.loads(read_small(path))
    except (ValueError, RecursionError, OSError):
        values = [path.name]
    return [str(word) for word in values] if isinstance(values, list) else [str(values)]


def _load_same(right: Path, folder: Path) -> object:
    """What is loaded is what was saved: no damage may pass for a value."""
    from tests.helpers import assert_same_bits
    from training.storage.checkpoint import load_checkpoint

    state = load_checkpoint(folder / STEP)
    assert_same_bits(state, load_checkpoint(right / STEP))
    return state


def _examined(folder: Path) -> object:
    """The doctor is called for what is broken, and its lines go to a terminal."""
    from training.commands.doctor import examine

    findings = examine(folder)
    assert all(part.isprintable() for finding in findings for part in finding), findings
    return findings


def _load_signed(folder: Path) -> object:
    """A forger makes the checksums right: what is behind them must be safe, too."""
    from training.storage.checkpoint import load_params
    from training.storage.checkpoint_files import digest, sha256

    step = folder / STEP
    with suppress(OSError, ValueError, RecursionError):  # no JSON: nothing to sign
        meta = json.loads(read_small(step / "meta.json"))
        if isinstance(meta, dict):
            meta.pop("checksum", None)
            meta |= {"sha256": sha256(step / "state.safetensors")}
            (step / "meta.json").write_text(json.dumps(meta | {"checksum": digest(meta)}), encoding="utf-8")
    return load_params(folder / STEP)


def _shards(run: Path, home: Path) -> dict[str, Reader]:
    """A run's state as a sharded checkpoint, with its own checksums and with those of a forger."""
    from dataclasses import asdict

    from training.distributed.sharded_checkpoint import load_sharded, open_sharded, save_sharded
    from training.distributed.team import ALONE
    from training.run.settings import load_settings
    from training.step.hyper_step import init_state
    from training.storage.checkpoint import load_checkpoint
    from training.storage.checkpoint_files import digest, sha256

    config = load_settings(str(run / "config.yaml")).model
    state = load_checkpoint(run / STEP, init_state(config, torch.Generator()))
    about = {"config_dict": asdict(config), "tokenizer": "bytes", "settings": {}}
    with warnings.catch_warnings():  # one process alone saves
        warnings.simplefilter("ignore")
        save_sharded(home, state, config, ALONE.layout, about, 1, None)
    step = "sharded/step_000003"
    targets = [f"{step}/meta.json", *(str(path.relative_to(home)) for path in (home / step).glob("*.safetensors"))]

    def load(folder: Path) -> object:
        return load_sharded(open_sharded(folder / step), config, ALONE.layout)

    def load_signed(folder: Path) -> object:
        with suppress(OSError, ValueError, RecursionError):
            meta = json.loads(read_small(folder / step / "meta.json"))
            if isinstance(meta, dict):
                meta.pop("checksum", None)
                meta |= {"sha256": {path.name: sha256(path) for path in (folder / step).glob("*.safetensors")}}
                text = json.dumps(meta | {"checksum": digest(meta)})
                (folder / step / "meta.json").write_text(text, encoding="utf-8")
        return load(folder)

    return {
        "sharded checkpoint": Reader(load, home, targets),
        "sharded checkpoint, checksums right": Reader(load_signed, home, [targets[0], *targets[1:] * 2]),
    }


def _sharded(folder: Path, out: Path) -> Path:
    """The same weights, all in one shard that an index names."""
    shutil.copytree(folder, out)
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    data = (out / "model-00001-of-00001.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = {name: "model-00001-of-00001.safetensors" for name in header if name != "__metadata__"}
    index = {"metadata": {"total_size": len(data)}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


def _quietly(function: Callable[[list[str]], int], argv: list[str]) -> None:
    with redirect_stderr(StringIO()) as said, open(os.devnull, "w") as nowhere:
        old, sys.stdout = sys.stdout, nowhere
        try:
            status = function(argv)
        finally:
            sys.stdout = old
    assert status == 0, said.getvalue()
