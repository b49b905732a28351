"""Results of a study -> analysis.json: intervals, differences paired by seed, equivalence, verdicts, an answer.

Arms are compared by held-out nats per token; less is better. An arm's difference to the baseline is the mean over seeds
of (arm - baseline) at the same seed, hence the same data order. In a stream the nats are the mean over all tasks at the
end, and a pair is a seed with all orders of the tasks (`training.statistics`); a seed that lacks one is left out. Tests
and intervals are about seeds and orders that were not run; `same_orders_low` and `same_orders_high` bound the mean over
the orders that were, at 95 %, and no verdict stands on them.

- better, worse: the paired t-test rejects no difference at 5 %, corrected, and the difference is not shown to be within
  the margin. `beyond_margin`: it is shown, at 5 % and corrected, to be beyond the margin.
- equivalent: two one-sided t-tests (TOST) at 5 %, corrected, put the difference within the margin, which was set before
  the runs; three pairs or more. `low` and `high` are then those of the interval that decided it, at `level`.
- identical: every pair has the same score to the last digit, so what the arm changes had no effect.
- undecided: neither; also with fewer than two pairs, or when a run of the arm diverged: one whose score is not finite
  did, whatever its row says.

Corrected is (Holm 1979) over the family of all comparisons that the study planned: every arm at every point of the
axes. The answer is read as one, and the best of all its lines is what a reader takes home, so a size or a text more is
as much a chance to be wrong as an arm more. Comparisons without runs count as well: what was finished, or did not
diverge, must not decide how strictly the rest is judged. Better or worse, equivalent, and beyond the margin are three
families, each of them held at 5 %, for each answers a question of its own. One true difference can make only one of the
first two false, so a false verdict of any kind is in at most 10 % of studies, in 5 % of those whose arms are alike.

Where axes are tuned, an arm is compared at the point that the runs of `tune_seeds` found best, by runs that had no say
in it (`training.study.comparison.tuning`). A study without such seeds chooses by the runs that it compares: the
comparison is then one of as many as there are pairs of a point of the arm and one of its baseline (`tried`). Its p are
multiplied by that before Holm's method (Bonferroni), and `note` says so; intervals of 95 % are of the chosen points
alone.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float

from training.storage.atomic import write_text
from training.storage.regular_file import read_object
from training.storage.results import DIVERGED, FINISHED, Row, pair_key, read_results
from training.study.comparison.speedup import Scores, effective_speedup
from training.study.comparison.statistics import CONFIDENCE, beyond, holm, step_down, t_interval, t_test, tost
from training.study.comparison.tuning import SCORE as MEASURE
from training.study.comparison.tuning import as_judged, choose, points_of, tuning_curves, tuning_warnings
from training.study.config import StudyConfig, baselines_of, expand
from training.study.summary import empty_row
from training.study.tasks import Continual

LEVEL = 0.05  # of all tests, of the whole family
MATCHED = 0.05  # avg_k, or the operations of a forward pass, within this share of the baseline's count as equal
SHARED = (
    "Tuned ({}) by the runs that are compared: every p is multiplied by the pairs of points that were tried, and the "
    "means and intervals of 95 % flatter all arms; `tune_seeds` in the study's file tune on seeds of their own."
)
BESIDE = (
    "bits_per_byte",
    "avg_k",
    "max_vio",
    "dead_experts",
    "gating_acc",
    "gating_trivial",
    "active_parameters",
    "flops_per_token",
    "load_entropy",
    "regret",
    "regret_random",
    "regret_w2",
    "oracle_hits",
    "co_activation",
    "routing_drift",
    "seconds",
)
OWN = ("co_activation_cosine",)  # tables of one run's experts: those of other seeds are strangers, so no mean is made


def analyse(folder: str | Path) -> dict[str, Any]:
    """The analysis of a study's folder, which is also written there as analysis.json."""
    from training.study.file import load_study

    folder = Path(folder)
    rows = read_results(folder)
    facts, curves = read_facts(folder, [row["run"] for row in rows])
    analysis = analyse_rows(load_study(folder / "study.yaml"), rows, facts, curves)
    write_text(folder / "analysis.json", json.dumps(analysis, indent=2) + "\n")
    return analysis


def analyse_rows(
    study: StudyConfig,
    rows: Sequence[Row],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    curves: Mapping[str, Scores] | None = None,
) -> dict[str, Any]:
    """Compute the values of analysis.json from the rows of results.csv.

    Numbers of rows may be text; each run may bring its routing facts and its held-out curve.
    """
    points = points_of(study, rows)
    chosen = choose(points)
    compared = _compared(study, rows, chosen)
    baselines = baselines_of(study)
    arms = {
        label: _describe(runs, chosen[label], facts or {})
        | {"points": len(points[label]), "tuning": tuning_curves(points[label], zipped=study.combine == "zip")}
        for label, runs in compared.items()
    }
    pairs = {
        label: paired_differences(compared[label], compared[other], MEASURE)
        for label, other in baselines.items()
        if label != other
    }
    lost = {label for label in pairs if arms[label]["diverged"] or arms[baselines[label]]["diverged"]}
    shared = bool(study.tune) and not study.tune_seeds
    tried = {label: len(points[label]) * len(points[baselines[label]]) if shared else 1 for label in pairs}
    against = judge(pairs, study.margin, lost, tried)
    for label, pair in against.items():
        ours, theirs = compared[label], compared[baselines[label]]
        pair["baseline"] = baselines[label]
        pair["effective_speedup"] = None if study.tasks else _speedup(ours, theirs, curves or {})
        for key, measure in {"k_matched": "avg_k", "flops_matched": "flops_per_token"}.items():
            a, b = arms[label][measure], arms[baselines[label]][measure]
            pair[key] = None if a is None or not b else abs(a / b - 1) <= MATCHED
    stream = {"continual": _continual(compared, baselines)} if study.tasks else {}
    settings = {key: getattr(study, key) for key in ("name", "question", "margin", "falsifier")}
    baseline = study.baseline or next(iter(baselines.values()))
    warnings = [tuning_warnings(label, points[label], arms[label]["tuning"]) for label in arms]
    return {
        **settings, "baseline": baseline, "measure": MEASURE, "confidence": CONFIDENCE, "tuned": list(study.tune),
        "tuned_on": list(study.tune_seeds), "note": SHARED.format(", ".join(study.tune)) if shared else "",
        "warnings": [*chain(*warnings)], "matched_within": MATCHED,
        "answer": _answer(against, baseline, study.margin), "arms": arms, "against_baseline": against, **stream,
    }  # fmt: skip


def paired_differences(ours: Sequence[Row], theirs: Sequence[Row], measure: str) -> Float[np.ndarray, "pairs orders"]:
    """ours - theirs, one row for each seed that has finished runs of both for every order of the tasks."""
    differences = _grid(ours, measure, (*ours, *theirs)) - _grid(theirs, measure, (*ours, *theirs))
    return _whole(differences)


def judge(
    differences: Mapping[str, Float[np.ndarray, "pairs orders"]],
    margin: float,
    lost: Collection[str] = (),
    tried: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Label -> tests, verdict and interval of its paired differences; `lost` are those where a run diverged.

    `tried` says of how many comparisons of a label these are the chosen ones; 1 where it says nothing.
    """
    comparisons = decide({label: _compare(pairs, margin) for label, pairs in differences.items()}, lost, tried)
    multiplied = step_down(_planned(comparisons, "tost_p"))
    for label, pair in comparisons.items():
        if pair["verdict"] == "equivalent":
            pair["level"] = 1 - 2 * LEVEL / (multiplied[label] * pair["tried"])
            _, pair["low"], pair["high"] = t_interval(differences[label], pair["level"])
    return comparisons


def decide(
    pairs: Mapping[str, Mapping[str, Any]], lost: Collection[str] = (), tried: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """The comparisons of one family with their p values corrected, and verdicts."""
    comparisons = {label: {**pair, "tried": (tried or {}).get(label, 1)} for label, pair in pairs.items()}
    for key in ("p", "tost_p", "beyond_p"):
        corrected = holm(_planned(comparisons, key))
        for label, pair in comparisons.items():
            pair[f"{key}_holm"] = None if pair[key] is None else corrected[label]
    for label, pair in comparisons.items():
        pair["beyond_margin"] = None if pair["beyond_p"] is None else pair["beyond_p_holm"] < LEVEL
        pair["verdict"] = "undecided" if label in lost else _verdict(pair)
    return comparisons


def read_facts(folder: Path, runs: Sequence[str]) -> tuple[dict[str, Mapping[str, Any]], dict[str, Scores]]:
    """(run -> `routing` of its summary.json, run -> its held-out curve), for the runs that have them."""
    facts: dict[str, Mapping[str, Any]] = {}
    curves: dict[str, Scores] = {}
    for run in runs:
        path = folder / "runs" / run / "summary.json"
        summary = read_object(path) if path.exists() else {}
        if isinstance(of_run := summary.get("routing"), dict):
            facts[run] = of_run
        if curve := _curve(summary.get("held_out_curve")):
            curves[run] = curve
    return facts, curves


def _curve(value: Any) -> Scores:
    """A curve of a summary; () where it is none, or has a score that is not finite."""
    try:
        curve = [(float(step), float(nats)) for step, nats in value or ()]
    except (TypeError, ValueError):
        return ()
    rising = all(a[0] < b[0] for a, b in pairwise(curve))
    return curve if rising and all(step > 0 and math.isfinite(nats) for step, nats in curve) else ()


def mean_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Facts of the same form, number by number their mean over the runs that know it; None without any run."""
    return (
        _mean([{key: value for key, value in of_run.items() if key not in OWN} for of_run in facts]) if facts else None
    )


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


# Pieces ---------------------------------------------------------------------------------------------------------------


def _compared(study: StudyConfig, rows: Sequence[Row], chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Label -> rows of the runs that are compared, those at its chosen point; what has not begun has an empty row."""
    by_run = {row["run"]: as_judged(row) for row in rows}
    compared: dict[str, list[Row]] = {label: [] for label in chosen}
    for run in expand(study, chosen):
        if run.seed in study.seeds and run.tuned == chosen[run.arm]:
            compared[run.arm].append(by_run.get(run.id) or empty_row(run))
    return compared


def _speedup(ours: Sequence[Row], theirs: Sequence[Row], curves: Mapping[str, Scores]) -> dict[str, Any] | None:
    """Effective speed-up of an arm's finished runs, paired by seed."""
    mine, others = (
        {pair_key(row): curves.get(row["run"], ()) for row in rows if row["status"] == FINISHED}
        for rows in (ours, theirs)
    )
    keys = [key for key in mine if key in others]
    return effective_speedup([mine[key] for key in keys], [others[key] for key in keys])


def _describe(rows: Sequence[Row], tuned: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores, whole = _scores(rows), _whole(_grid(rows, MEASURE, rows))
    mean, low, high = _interval(whole)
    beside = {key: [float(row[key]) for row in rows if row.get(key) not in (None, "")] for key in BESIDE}
    return {
        "mean": fmean(scores) if mean is None and scores else mean,
        "low": low,
        "high": high,
        "n": whole.size or len(scores),
        "seeds": len(whole) or len({str(row["seed"]) for row in rows if row["status"] == FINISHED}),
        **{key: fmean(values) if values and np.isfinite(values).all() else None for key, values in beside.items()},
        "diverged": sum(row["status"] == DIVERGED for row in rows),
        "tuned": dict(tuned),
        "runs": [row["run"] for row in rows],
        "routing": mean_facts([facts[row["run"]] for row in rows if row["run"] in facts]),
    }


def _compare(pairs: Float[np.ndarray, "pairs orders"], margin: float) -> dict[str, Any]:
    if not len(pairs):
        return dict.fromkeys(("difference", "low", "high", "level", "p", "tost_p", "beyond_p", "identical")) | {"n": 0}
    mean, low, high = _interval(pairs)
    _, *same = t_interval(pairs.mean(axis=1, keepdims=True))
    return {
        "difference": mean, "low": low, "high": high, "level": CONFIDENCE, "n": len(pairs), "orders": pairs.shape[1],
        "same_orders_low": same[0], "same_orders_high": same[1],
        "p": t_test(pairs), "tost_p": tost(pairs, margin), "beyond_p": beyond(pairs, margin),
        "identical": not pairs.any(),
    }  # fmt: skip


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair["tost_p_holm"] is not None and pair["tost_p_holm"] < LEVEL:
        return "equivalent"
    if pair["p_holm"] is not None and pair["p_holm"] < LEVEL:
        return "better" if pair["difference"] < 0 else "worse"
    return "undecided"


def _planned(pairs: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    """The p of every comparison of the plan, for the best of those that were tried; 1 where runs are missing."""
    return {label: 1.0 if pair[key] is None else min(1.0, pair[key] * pair["tried"]) for label, pair in pairs.items()}


def _continual(chosen: Mapping[str, Sequence[Row]], baselines: Mapping[str, str]) -> dict[str, Any]:
    """Arm -> measure of a stream -> its mean and interval, and those of the paired difference to the baseline."""
    results: dict[str, Any] = {}
    for label, rows in chosen.items():
        results[label] = {}
        for measure in Continual._fields:
            mine = _whole(_grid(rows, measure, rows))
            pairs = paired_differences(rows, chosen[baselines[label]], measure)
            alone = dict(zip(("mean", "low", "high"), _interval(mine), strict=True))
            against = _interval(pairs if label != baselines[label] else pairs[:0])
            names = "difference", "difference_low", "difference_high"
            results[label][measure] = alone | {"n": mine.size} | dict(zip(names, against, strict=True))
    return results


MENTIONED = 6  # arms without a verdict that a sentence can name


def _answer(against: Mapping[str, Mapping[str, Any]], baseline: str, margin: float) -> str:
    """One sentence: which arms beat the baseline, and what became of the others."""
    if not against:
        return f"Only {baseline} was run, so nothing is compared."
    parts = []
    for verdict, verb in {
        "better": "better than", "worse": "worse than", "equivalent": f"within {margin:g} nats of",
        "undecided": "no difference found from",
    }.items():  # fmt: skip
        ranked = sorted(
            (pair["difference"], name)
            for name, pair in against.items()
            if pair["verdict"] == verdict and pair["difference"] is not None
        )
        if len(ranked) > MENTIONED and verdict == "undecided":
            span = f"{ranked[0][0]:+.3f} to {ranked[-1][0]:+.3f}"
            parts.append(f"{verb} {baseline}: {len(ranked)} of {len(against)} ({span})")
        elif ranked:
            names = ", ".join(f"{name} ({difference:+.3f})" for difference, name in ranked)
            parts.append(f"{verb} {baseline}: {names}")
        elif verdict == "better":
            parts.append(f"no arm is better than {baseline}")
    if without := [name for name, pair in against.items() if pair["difference"] is None]:
        named = ": " + ", ".join(without) if len(without) <= MENTIONED else ""
        parts.append(f"{len(without)} of {len(against)} without a finished pair of runs{named}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _interval(table: Float[np.ndarray, "pairs orders"]) -> tuple[float | None, float | None, float | None]:
    mean, low, high = t_interval(table) if len(table) else (math.nan, None, None)
    return None if math.isnan(mean) else mean, low, high


def _scores(rows: Sequence[Row]) -> list[float]:
    """Scores of the runs that are finished."""
    return [float(row[MEASURE]) for row in rows if row["status"] == FINISHED]


def _grid(rows: Sequence[Row], measure: str, planned: Sequence[Row]) -> np.ma.MaskedArray:
    """(seeds, orders) the finished runs' values at the seeds and orders of the planned ones, masked without a run."""
    at = {(str(row["seed"]), row.get("order")): float(row[measure]) for row in rows if row["status"] == FINISHED}
    seeds, orders = (
        dict.fromkeys(str(row["seed"]) for row in planned),
        dict.fromkeys(row.get("order") for row in planned),
    )
    missing = [[(seed, order) not in at for order in orders] for seed in seeds]
    return np.ma.array([[at.get((seed, order), 0.0) for order in orders] for seed in seeds], mask=missing)


def _whole(grid: np.ma.MaskedArray) -> Float[np.ndarray, "pairs orders"]:
    """The rows without a gap; a value that is not finite is none."""
    return grid.data[~np.ma.getmaskarray(grid).any(axis=1)]
