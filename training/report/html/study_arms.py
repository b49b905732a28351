"""Data of a study's page: contents of the folder, and every arm with its curves, loads and alarms."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from numpy import array, ndarray

from training.report.digest import Digest, mean_curves
from training.report.html.arms import POINTS, Arm
from training.storage.results import DIVERGED, FINISHED, Row, pair_key

CURVES = ("main_loss", "held_out_nats", "max_vio", "avg_k", "routing_drift")
DigestOf = Callable[[str], Digest]  # run -> its records
SummaryOf = Callable[[str], Mapping[str, Any]]  # run -> its summary.json


class Study(NamedTuple):
    """Contents of a study's folder that its page shows."""

    folder: str  # as the reader names it
    values: Mapping[str, Any]  # of study.yaml
    text: str  # of study.yaml
    analysis: Mapping[str, Any]
    rows: Sequence[Row]  # of results.csv


class Group(NamedTuple):
    """A baseline and the arms that are compared with it, in the study's order."""

    baseline: str
    arms: list[Arm]

    def best_first(self) -> list[Arm]:
        """The arms by their mean score."""
        return sorted(self.arms, key=lambda arm: float("inf") if arm.result["mean"] is None else arm.result["mean"])


def read_groups(study: Study, digest_of: DigestOf, summary_of: SummaryOf) -> list[Group]:
    """All arms. `digest_of` and `summary_of` are asked once for each run."""
    labels: dict[str, list[str]] = {}
    for label in study.analysis["arms"]:
        pair = study.analysis["against_baseline"].get(label, {})
        labels.setdefault(pair.get("baseline", label), []).append(label)
    groups = []
    for baseline, members in labels.items():
        slots = {label: slot for slot, label in enumerate([baseline, *(m for m in members if m != baseline)])}
        end = shared_end(members) if len(labels) > 1 else ""
        arms = [_arm(study, label, label.removesuffix(end), slots[label], digest_of, summary_of) for label in members]
        groups.append(Group(baseline, arms))
    return groups


def shared_end(labels: Sequence[str]) -> str:
    """The words key=value with which all of several labels end, each label being longer; "" if there are none.

    ["frozen data=a", "hash data=a"] -> " data=a"
    """
    words = [label.split(" ") for label in labels]
    count = 0
    while all(len(parts) > count + 1 and "=" in parts[-1 - count] for parts in words) and len(labels) > 1:
        if len({parts[-1 - count] for parts in words}) > 1:
            break
        count += 1
    return "".join(f" {word}" for word in words[0][len(words[0]) - count :])


def scores_by_seed(study: Study, arm: Arm) -> dict[str, float]:
    """Seed (and order of tasks) -> held-out nats per token of the arm's finished runs, those that are finite."""
    runs = [row for row in study.rows if row["run"] in arm.result["runs"] and row["status"] == FINISHED]
    scores = {pair_key(row): float(row["nats_per_token"]) for row in runs}
    return {key: score for key, score in scores.items() if math.isfinite(score)}


def _arm(study: Study, label: str, short: str, slot: int, digest_of: DigestOf, summary_of: SummaryOf) -> Arm:
    result = study.analysis["arms"][label]
    digests = {run: digest_of(run) for run in result["runs"]}
    summaries = {run: summary_of(run) for run in result["runs"]}
    diverged = {row["run"] for row in study.rows if row["status"] == DIVERGED}
    tabled = (run for run, digest in digests.items() if digest.window.size and run not in diverged)
    run = next(tabled, "")
    ends = sorted(int(digests[run].last["step"]) for run in digests if run in diverged and digests[run].records)
    lost = ", ".join(map(str, ends))
    together = _cube((summaries.get(run, {}).get("routing") or {}).get("co_activation_cosine"))
    alarms = [summary.get("alarms") or [] for summary in summaries.values()]
    pair = study.analysis["against_baseline"].get(label)
    note = f"({len(ends)} diverged, at step {lost}; then the mean of those left)" if ends else ""
    curves = mean_curves([*digests.values()], POINTS, CURVES)
    shown = digests.get(run)
    return Arm(label, short, slot, [*digests.values()], curves, shown, run, result, pair, together, alarms, note)


def tuned_values(arm: Arm) -> str:
    """The values that were chosen for an arm."""
    tuned = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in arm.result.get("tuned", {}).items())
    return f"chosen: {tuned}" if tuned else ""


def alarm_lines(arms: Sequence[Arm]) -> list[str]:
    """Arm: kinds of alarm (what stands before the colon) and how many of its runs ring them, most frequent first."""
    lines = []
    for arm in arms:
        kinds = [kind for of_run in arm.alarms for kind in {alarm.partition(":")[0] for alarm in of_run}]
        counts = sorted(((kind, kinds.count(kind)) for kind in set(kinds)), key=lambda entry: (-entry[1], entry[0]))
        said = [f"{kind.lower()} in {count} of {len(arm.alarms)} runs" for kind, count in counts]
        lines += [f"{arm.label}: {', '.join(said)}"] if said else []
    return lines


def _cube(value: Any) -> Float[ndarray, "layers experts experts"] | None:
    """A table for each layer, None for anything else."""
    try:
        cube = array(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return cube if cube.ndim == 3 and cube.size else None
