"""The routing facts of an arm: means over its runs, whose summaries hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from training.storage.regular_file import read_object

OWN = ("co_activation_cosine",)  # tables of one run's experts: those of other seeds are strangers, so no mean is made


def read_facts(folder: Path, runs: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Run -> `routing` of its summary.json, for the runs that have one."""
    found: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        path = folder / "runs" / run / "summary.json"
        facts = read_object(path).get("routing") if path.exists() else None
        if isinstance(facts, dict):
            found[run] = facts
    return found


def mean_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Facts of the same form, number by number their mean over the runs that know it; None without any run."""
    return _mean([{key: value for key, value in one.items() if key not in OWN} for one in facts]) if facts else None


def _mean(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    first = known[0]
    if isinstance(first, Mapping):
        return {key: _mean([value.get(key) for value in known]) for key in first}
    if isinstance(first, list):
        return [_mean(items) for items in zip(*known, strict=True)]
    return first if isinstance(first, str) else fmean(known)
