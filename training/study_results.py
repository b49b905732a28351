"""What a study leaves behind: results.csv, one row a run, and each run's summary.json."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from tiny_onn_func.params import count_active_flops, count_active_params, count_params
from training.continual import Continual, Matrix, continual_measures
from training.errors import UserError
from training.report.alarms import WINDOW, collapse_alarms
from training.run.evaluate import Score
from training.step.metrics import load_entropy
from training.storage.atomic import write_text
from training.storage.recorder import read_history
from training.storage.regular_file import read_small
from training.study_config import StudyRun

RESULTS, NEEDED = "results.csv", ("run", "arm", "seed", "status")
MEND = "remove the file, --resume makes it anew"
MEASURES = (
    "nats_per_token", "bits_per_byte", "avg_k", "max_vio", "dead_experts", "gating_acc", "gating_trivial",
    "active_parameters", "flops_per_token", "load_entropy", "regret", "regret_random", "regret_w2", "oracle_hits",
    "co_activation", "routing_drift", "seconds", "status",
)  # fmt: skip
FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"
Row = dict[str, Any]


def empty_row(run: StudyRun) -> Row:
    """The row of a run that has not been made."""
    return {
        "run": run.id,
        "arm": run.arm,
        **run.overrides,
        **({"order": " > ".join(run.order)} if run.order else {}),
        "seed": run.seed,
        **dict.fromkeys(MEASURES),
        **dict.fromkeys(Continual._fields if run.order else ()),
        "status": UNFINISHED,
    }


def pair_key(row: Mapping[str, Any]) -> str:
    """What two rows of a pair have in common: the seed, and the order of the tasks where there is one."""
    return f"{row['seed']}, {row['order']}" if row.get("order") else str(row["seed"])


def finished_row(
    run: StudyRun, score: Score | None, seconds: float, folder: Path, facts: Mapping[str, Any] | None = None,
    matrix: Matrix = (),
) -> Row:  # fmt: skip
    """The row of a run that is done; without a score it diverged.

    max_vio, gating_acc, gating_trivial and load_entropy are means over the last WINDOW records; dead_experts counts the
    (layer, expert) pairs that got no token in any of them; avg_k is the held-out one; routing_drift is that of the last
    evaluation during the run. `facts` are those of `training.routing_facts`, `matrix` the scores of a stream of tasks.
    """
    row = empty_row(run) | {"seconds": round(seconds, 3), "status": DIVERGED}
    if score is None:
        return row
    history = read_history(folder)
    window = history[-WINDOW:]
    loads = np.asarray([record["expert_load"] for record in window])
    measures = continual_measures(matrix)._asdict() if run.order else {}
    means = {key: _mean(window, key) for key in ("max_vio", "gating_acc", "gating_trivial")}
    return row | means | routing_columns(facts) | {
        "nats_per_token": _rounded(score.nats_per_token),
        "bits_per_byte": _rounded(score.bits_per_byte),
        "avg_k": _rounded(score.avg_k),
        "dead_experts": int((loads == 0).all(axis=0).sum()),
        "load_entropy": _rounded(fmean(float(load_entropy(torch.from_numpy(load))) for load in loads)),
        "routing_drift": _mean([record for record in history if "routing_drift" in record][-1:], "routing_drift"),
        "active_parameters": round(count_active_params(run.config.model, score.avg_k)),
        "flops_per_token": round(count_active_flops(run.config.model, score.avg_k, run.config.sequence_length)),
        "status": FINISHED,
        **{key: _rounded(value) for key, value in measures.items()},
    }  # fmt: skip


def routing_columns(facts: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What results.csv keeps of a run's `training.routing_facts`."""
    if facts is None:
        return {}
    of = facts["regret"]
    regrets = {"regret": of["router"], "regret_random": of["random"], "regret_w2": of["w2"]}
    return regrets | {key: facts[key] for key in ("oracle_hits", "co_activation")}


def write_summary(
    run: StudyRun, row: Row, score: Score | None, steps: int, folder: Path, facts: Mapping[str, Any] | None = None,
    matrix: Matrix = (),
) -> None:  # fmt: skip
    """summary.json of a run: as after `tiny-onn train`, with the arm, what became of it, and its routing's facts."""
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
        "routing": facts,
    }  # fmt: skip
    if run.order:
        known = None if score is None else [[_rounded(value) for value in line] for line in matrix]
        summary |= {key: row[key] for key in Continual._fields} | {"order": run.order, "score_matrix": known}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """results.csv of all rows, in one move."""
    file = io.StringIO()
    keys = dict.fromkeys(key for row in rows for key in row)  # rows of an older version may have fewer
    writer = csv.DictWriter(file, fieldnames=[*keys], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / RESULTS, file.getvalue())


def read_results(folder: Path) -> list[Row]:
    """The rows of results.csv as text; none when there is no such file.

    Raises:
        UserError: no table, a row without a name, arm, seed or status, or one that names a place outside the study.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    text = read_small(path).decode("utf-8", "replace")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="more", restval=""))
    except csv.Error as error:
        raise UserError(f"{path}: expected a table, got: {error}; {MEND}") from None
    for number, row in enumerate(rows, 2):
        if missing := [key for key in NEEDED if not row.get(key)]:
            raise UserError(f"{path}, line {number}: expected {missing[0]}, got none; {MEND}")
        if not re.fullmatch(r"[^/\\\x00-\x1f]+", row["run"]) or row["run"] in (".", ".."):
            raise UserError(f"{path}, line {number}: run: expected the name of a folder, got {row['run']!r}; {MEND}")
    return rows


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [record[key] for record in records if record.get(key) is not None]
    return _rounded(sum(found) / len(found)) if found else None


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
