"""What a study leaves behind: results.csv, one row a run, and each run's summary.json."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn_func.params import count_active_params, count_params
from training.alarms import WINDOW, collapse_alarms
from training.evaluate import Score
from training.recorder import read_history
from training.study_config import StudyRun

RESULTS = "results.csv"
MEASURES = (
    "nats_per_token", "bits_per_byte", "avg_k", "max_vio", "dead_experts", "gating_acc", "gating_trivial",
    "active_parameters", "seconds", "status",
)  # fmt: skip
FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"
Row = dict[str, Any]


def empty_row(run: StudyRun) -> Row:
    """The row of a run that has not been made."""
    return {
        "run": run.id,
        "arm": run.arm,
        **run.overrides,
        "seed": run.seed,
        **dict.fromkeys(MEASURES),
        "status": UNFINISHED,
    }


def finished_row(run: StudyRun, score: Score | None, seconds: float, folder: Path) -> Row:
    """The row of a run that is done; without a score it diverged.

    max_vio, gating_acc and gating_trivial are means over the last WINDOW records; dead_experts counts the (layer,
    expert) pairs that got no token in any of them; avg_k is the held-out one.
    """
    row = empty_row(run) | {"seconds": round(seconds, 3), "status": DIVERGED}
    if score is None:
        return row
    window = read_history(folder)[-WINDOW:]
    loads = np.asarray([record["expert_load"] for record in window])
    means = {key: _mean(window, key) for key in ("max_vio", "gating_acc", "gating_trivial")}
    return row | means | {
        "nats_per_token": _rounded(score.nats_per_token),
        "bits_per_byte": _rounded(score.bits_per_byte),
        "avg_k": _rounded(score.avg_k),
        "dead_experts": int((loads == 0).all(axis=0).sum()),
        "active_parameters": round(count_active_params(run.config.model, score.avg_k)),
        "status": FINISHED,
    }  # fmt: skip


def write_summary(run: StudyRun, row: Row, score: Score | None, steps: int, folder: Path) -> None:
    """summary.json of a run: as after `tiny-onn train`, with the arm and what became of it."""
    model, tokens = run.config.model, steps * run.config.batch_size * run.config.sequence_length
    summary = {
        **{key: row[key] for key in ("run", "arm", "seed", *MEASURES)},
        "overrides": run.overrides,
        "accuracy": None if score is None else score.accuracy,
        "steps": steps,
        "tokens": tokens,
        "train_seconds": row["seconds"],
        "tokens_per_second": round(tokens / max(row["seconds"], 1e-9), 1),
        "parameters": count_params(model),
        "held_out_bytes": None if score is None else score.bytes,
        "held_out_tokens": None if score is None else score.tokens,
        "alarms": collapse_alarms(
            read_history(folder), model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
            min_experts_per_tok=model.min_experts_per_tok, max_experts_per_tok=model.max_experts_per_tok,
        ),
    }  # fmt: skip
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """results.csv of all rows, in one move."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / RESULTS, file.getvalue())


def read_results(folder: Path) -> list[Row]:
    """The rows of results.csv as text; none when there is no such file."""
    path = folder / RESULTS
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [record[key] for record in records if record.get(key) is not None]
    return _rounded(sum(found) / len(found)) if found else None


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
