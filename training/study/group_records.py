"""Records of a group's runs: one metrics.jsonl each, with scores and routing where an evaluation was made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tiny_onn_func.tree import to_device, unstack
from training.fields import Field
from training.run.evaluate import recorded
from training.step.metrics import Metrics
from training.storage.atomic import write_text
from training.storage.recorder import FILE, Recorder, records_upto, rewrite_records
from training.study.group_state import GroupRun, GroupState
from training.study.routing_analysis import RouterSnapshot, drift, router_snapshot
from training.study.tasks import overall, score_tasks

SNAPSHOT = {  # in the record of a step after which the run was scored
    "routing_drift": Field(
        "share",
        "Held-out tokens whose first choice changed since the last score, mean over layers.",
    ),
    "routing_drift_layers": Field("share, (L,)", "The same for each layer."),
    "co_activation_layers": Field(
        "nats, (L,)",
        "Excess co-activation of each layer's experts on held-out text; 0 is chance.",
    ),
}  # fmt: skip


def open_record(folder: Path, step: int) -> Recorder:
    """The run's metrics.jsonl for appending, without what came after `step`. No loggers: there may be hundreds."""
    path = folder / FILE
    if path.exists():
        rewrite_records(folder, records_upto(folder, step))
    else:
        write_text(path, "")
    return Recorder(path.open("a", encoding="ascii"))


def snapshot(group: GroupRun, state: GroupState) -> RouterSnapshot | None:
    """A look at all routers on held-out tokens; None where it is not wanted."""
    if not (group.study.analysis_tokens and group.config.eval_every):
        return None
    return router_snapshot(state.runs.params, group.configs, group.held_out, group.study.analysis_tokens)


def record_step(group: GroupRun, state: GroupState, metrics: Metrics, recorders: Sequence[Recorder]) -> GroupState:
    """Append the records of a step, those of runs that diverged earlier left out; with the new first choices."""
    config, step = group.config, int(state.step)
    is_scored = config.eval_every > 0 and step % config.eval_every == 0
    is_due = is_scored or step in (1, config.steps) or step % group.study.record_every == 0
    scores = score_tasks(state.runs.params, group.runs, group.corpora, config.eval_bytes) if is_scored else []
    snap = snapshot(group, state) if is_scored else None
    extras = [recorded(overall(tasks)) for tasks in scores] or [{} for _ in group.runs]
    extras = [a | b for a, b in zip(extras, _routing(state, snap), strict=True)] if snap is not None else extras
    tokens, seconds = step * config.batch_size * config.sequence_length, float(state.seconds) / len(group.runs)
    rows = zip(unstack(to_device(metrics, "cpu")), extras, state.diverged_at.tolist(), recorders, strict=True)
    for of_run, extra, diverged_at, recorder in rows:
        if diverged_at == step or (is_due and not diverged_at):
            recorder.write(step, tokens, seconds, of_run._asdict() | extra)
    return state if snap is None else state._replace(choices=snap.first_choices)


def _routing(state: GroupState, snap: RouterSnapshot) -> list[dict[str, Any]]:
    """Routing drift since the last snapshot and co-activation of the experts, a record for each run."""
    drifts = drift(state.choices, snap.first_choices).cpu().to(torch.float64)
    return [
        dict(zip(SNAPSHOT, (float(layers.mean()), layers, together), strict=True))
        for layers, together in zip(drifts, snap.co_activation, strict=True)
    ]
