"""Files of a finished study: results.csv, one row a run, and each run's summary.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from tiny_onn_func.params import count_active_flops, count_active_params, count_params
from training.fields import Field, fields_of
from training.report.alarms import WINDOW
from training.run.evaluate import Score
from training.run.summary import OF_SCORE, alarms
from training.step.metrics import load_entropy
from training.storage.atomic import write_text
from training.storage.recorder import read_history
from training.storage.results import DIVERGED, FINISHED, IDENTITY, MEASURES, UNFINISHED, Row
from training.study.config import StudyRun
from training.study.tasks import Continual, Matrix, continual_measures


def empty_row(run: StudyRun) -> Row:
    """Row of an unfinished run."""
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


class Outcome(NamedTuple):
    """Outcome of a run of a study."""

    run: StudyRun
    folder: Path
    steps: int  # made, or up to the one at which it diverged
    seconds: float
    score: Score | None  # None: it diverged
    facts: Mapping[str, Any] | None = None  # of `routing_analysis`
    matrix: Matrix = ()  # scores of a stream of tasks


def finished_row(outcome: Outcome) -> Row:
    """Row of a finished or diverged run.

    max_vio, gating_acc, gating_trivial and load_entropy are means over the last WINDOW records; dead_experts counts the
    (layer, expert) pairs that got no token in any of them; avg_k is the held-out one; routing_drift is that of the last
    evaluation during the run.
    """
    run, score = outcome.run, outcome.score
    row = empty_row(run) | {"seconds": round(outcome.seconds, 3), "status": DIVERGED}
    if score is None:
        return row
    history = read_history(outcome.folder)
    window = history[-WINDOW:]
    loads = np.asarray([record["expert_load"] for record in window])
    measures = continual_measures(outcome.matrix)._asdict() if run.order else {}
    means = {key: _mean(window, key) for key in ("max_vio", "gating_acc", "gating_trivial")}
    return row | means | routing_columns(outcome.facts) | {
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
    """Columns of results.csv from a run's `training.study.routing_analysis`."""
    if facts is None:
        return {}
    of = facts["regret"]
    regrets = {"regret": of["router"], "regret_random": of["random"], "regret_w2": of["w2"]}
    return regrets | {key: facts[key] for key in ("oracle_hits", "co_activation")}


SUMMARY = {
    **{key: IDENTITY[key] for key in ("run", "arm", "seed")},
    **MEASURES,
    "overrides": Field("object", "Each setting that an arm or an axis changes, and this run's value."),
    **OF_SCORE,
    "held_out_curve": Field("steps, nats per token", "Evaluations during the run, on `eval_bytes` of the text."),
    "routing": Field("object", "Routing analysis on held-out tokens; null where it was not made."),
}
STREAM = {  # in studies with `tasks`
    **fields_of(Continual),
    "order": IDENTITY["order"],
    "score_matrix": Field(
        "nats per token",
        "R[i][j]: loss of the j-th task of the order after training on the i-th one.",
    ),
}  # fmt: skip


def write_summary(outcome: Outcome, row: Row) -> None:
    """Write a run's summary.json: as after `tiny-onn train`, with its arm, its outcome and its routing analysis."""
    run, score, steps, folder = outcome.run, outcome.score, outcome.steps, outcome.folder
    model, tokens = run.config.model, steps * run.config.batch_size * run.config.sequence_length
    history = read_history(folder)
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
        "held_out_curve": [
            (record["step"], record["held_out_nats"]) for record in history if record.get("held_out_nats") is not None
        ],
        "alarms": alarms(history, run.config),
        "routing": outcome.facts,
    }  # fmt: skip
    if run.order:
        known = None if score is None else [[_rounded(value) for value in line] for line in outcome.matrix]
        summary |= {key: row[key] for key in Continual._fields} | {"order": run.order, "score_matrix": known}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return _rounded(sum(values) / len(values)) if values else None


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
