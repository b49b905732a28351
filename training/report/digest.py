"""Digest of a run's records for its page: scalars and measures of layers whole, tables of experts as block means.

`extend` takes records as they come, so that a page of a run that goes on reads each of them once.

With p the shares of a layer's routed rows that its E experts got:

    load entropy  = -sum_e p_e log p_e / log E           1: an even load, 0: one expert takes all
    MaxVio        = (max p - mean p) / mean p            0: an even load, E - 1: one expert takes all
    dead experts  = experts of the layer without a row in the batch
    co-activation = as `training.study.routing_analysis.coactivation_excess` has it, measured on held-out text
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from training.report.alarms import WINDOW
from training.report.series import Records, columns_of, gather, numbers, table_shape, tables

SCALARS = (
    "step", "tokens", "seconds", "main_loss", "held_out_nats", "main_acc", "gating_acc", "gating_trivial",
    "router_loss", "avg_k", "max_vio", "dead_experts", "surprise", "pi_score", "tau", "routing_drift",
)  # fmt: skip
LAYERED = ("load entropy", "MaxVio", "dead experts", "co-activation")
TABLES = ("expert_load", "target_load", "expert_surprise")
BLOCKS = 24  # at least so many means of tables are kept, and at most twice as many


class Digest(NamedTuple):
    """A run's records so far."""

    records: int
    last: Mapping[str, Any]  # record
    scalars: Float[np.ndarray, "keys records"]  # in the order of SCALARS, NaN where unknown
    layered: Float[np.ndarray, "measures records layers"]  # in the order of LAYERED
    window: Float[np.ndarray, "tables window layers experts"]  # of the last records, in the order of TABLES
    sums: Float[np.ndarray, "tables blocks layers experts"]  # of the known entries of a block
    known: Float[np.ndarray, "tables blocks layers experts"]
    stride: int  # records of a block


def empty_digest() -> Digest:
    """Digest of no record."""
    none = np.zeros((len(TABLES), 0, 0, 0))
    return Digest(0, {}, np.zeros((len(SCALARS), 0)), np.zeros((len(LAYERED), 0, 0)), none, none, none, 1)


def _reshaped(digest: Digest, shape: tuple[int, ...]) -> Digest:
    """A digest whose tables of experts are forgotten, for records of another shape."""
    blocks = np.full((len(TABLES), digest.sums.shape[1], *shape), np.nan)
    layered = np.full((len(LAYERED), digest.records, shape[0]), np.nan)
    return digest._replace(layered=layered, window=blocks[:, :0], sums=blocks, known=np.zeros(blocks.shape))


def extend(digest: Digest, records: Records) -> Digest:
    """Append records. Tables of another shape than the newest one are dropped."""
    if not records:
        return digest
    shape = table_shape(records, TABLES) or digest.window.shape[2:]
    if shape != digest.window.shape[2:]:
        digest = _reshaped(digest, shape)
    new = np.stack([tables(records, key, shape) for key in TABLES])
    company = np.array([_layers(record, shape[0]) for record in records], dtype=float).reshape(len(records), shape[0])
    layered = np.stack([*measures(new[0]), company])
    count = digest.records + len(records)
    stride, sums, known = _blocks(digest, new)
    return Digest(
        count,
        records[-1],
        np.concatenate([digest.scalars, np.stack([numbers(records, key) for key in SCALARS])], axis=1),
        np.concatenate([digest.layered, layered], axis=1),
        np.concatenate([digest.window, new], axis=1)[:, -WINDOW:],
        sums,
        known,
        stride,
    )


def measures(load: Float[np.ndarray, "*records layers experts"]) -> list[Float[np.ndarray, "*records layers"]]:
    """Load entropy, MaxVio and dead experts of every layer, NaN where the load is not known."""
    experts = load.shape[-1]
    if not load.size:
        return [np.full(load.shape[:-1], np.nan)] * 3
    p = load / np.where((total := load.sum(axis=-1, keepdims=True)) > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1) / (math.log(experts) if experts > 1 else 1.0)
    dead = np.where(np.isnan(p), np.nan, p == 0).sum(axis=-1)
    return [entropy if experts > 1 else p.sum(axis=-1), p.max(axis=-1) * experts - 1, dead]


# Curves ---------------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A quantity over steps, and over seconds of training."""

    step: Float[np.ndarray, " points"]
    seconds: Float[np.ndarray, " points"]  # NaN where unknown
    y: Float[np.ndarray, "*layers points"]


def mean_curves(digests: Sequence[Digest], most: int, keys: Sequence[str] = SCALARS) -> dict[str, Curve]:
    """Means over runs: key of SCALARS -> curve of at most `most` points, none of a step where no run has a value."""
    scalars = np.concatenate([digest.scalars for digest in digests] or [empty_digest().scalars], axis=1)
    curves = _curves(digests, scalars[[SCALARS.index(key) for key in keys], None], most)
    return {key: curve._replace(y=curve.y[0]) for key, curve in zip(keys, curves, strict=True)}


def layer_curves(digests: Sequence[Digest], most: int) -> dict[str, Curve]:
    """`mean_curves` of the measures of LAYERED in every layer."""
    layers = max((digest.layered.shape[2] for digest in digests), default=0)
    alike = [np.full((len(LAYERED), digest.records, layers), np.nan) for digest in digests]
    for digest, layered in zip(digests, alike, strict=True):
        layered[..., : digest.layered.shape[2]] = digest.layered
    values = np.concatenate(alike, axis=1).swapaxes(1, 2) if layers else ()
    return dict(zip(LAYERED, _curves(digests, values, most), strict=False))


def _curves(digests: Sequence[Digest], rows: Iterable[Float[np.ndarray, "rows records"]], most: int) -> list[Curve]:
    """A curve of each mean over runs; `rows` have the records of all digests, one after another."""
    step, seconds = (
        np.concatenate([d.scalars[SCALARS.index(k)] for d in digests] or [[]]) for k in ("step", "seconds")
    )
    at = np.isfinite(step)
    steps, where = np.unique(step[at], return_inverse=True)
    (seconds,) = _means(seconds[None, at], where, len(steps))
    curves = []
    for values in rows:
        means = _means(values[:, at], where, len(steps))
        known = np.isfinite(means).any(axis=0)
        columns = columns_of(steps[known], most)
        y = gather(means[:, known].T, columns.starts).T
        curves.append(Curve(columns.x, gather(seconds[known], columns.starts), y))
    return curves


def surprise_shares(arms: Sequence[Sequence[Digest]], bins: int = 24) -> list[Curve]:
    """Share of each layer's last rows by the mean surprise of the expert that they went to, over the surprise in nats.

    One curve for the digests of each arm, all over the same bins, which are evenly spaced by the logarithm.
    """
    windows = [d.window[[TABLES.index("expert_surprise"), TABLES.index("expert_load")]] for of in arms for d in of]
    known = np.concatenate([nats[np.nan_to_num(nats) > 0] for nats, _ in windows] or [np.zeros(0)])
    if not known.size:
        return [Curve(known, known, known)] * len(arms)
    low, high, layers = float(known.min()), float(known.max()), max(window.shape[2] for window in windows)
    edges = np.geomspace(low, high, bins + 1) if high > low else np.array([low / 2, low * 2])
    middle, curves, rest = np.sqrt(edges[1:] * edges[:-1]), [], iter(windows)
    for of in arms:
        rows = np.zeros((layers, len(middle)))
        for nats, load in (next(rest) for _ in of):
            for layer in range(nats.shape[1]):
                at = (np.nan_to_num(nats[:, layer]) > 0) & np.isfinite(load[:, layer])
                rows[layer] += np.histogram(nats[:, layer][at].clip(low, high), edges, weights=load[:, layer][at])[0]
        curves.append(Curve(middle, middle, rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-30)))
    return curves


def _means(values: Float[np.ndarray, "rows records"], where: Int[np.ndarray, " records"], steps: int) -> np.ndarray:
    """Mean of the known values of each step, NaN where there is none."""
    out = np.full((len(values), steps), np.nan)
    for row, mean in zip(values, out, strict=True):
        known = np.isfinite(row)
        counts = np.bincount(where[known], minlength=steps)
        np.divide(np.bincount(where[known], row[known], steps), counts, out=mean, where=counts > 0)
    return out


# Tables of experts ----------------------------------------------------------------------------------------------------


def table_at_end(digest: Digest, key: str) -> Float[np.ndarray, "layers experts"] | None:
    """Mean table of the last WINDOW records, NaN where nothing is known; None if none of them has it.

    The surprise is the mean over the records in which the expert got rows, and 0 where it got none in any.
    """
    sums, known = _sum(digest.window)
    table = _mean(sums, known)[TABLES.index(key)]
    return table if np.isfinite(table).any() else None


def tables_over_steps(digest: Digest, key: str, most: int) -> list[tuple[int, Float[np.ndarray, "layers experts"]]]:
    """(last step of a block of records, its mean table), `most` blocks at most, the first and the last among them."""
    blocks, means = digest.sums.shape[1], _mean(digest.sums, digest.known)[TABLES.index(key)]
    picks = np.unique(np.linspace(0, blocks - 1, min(most, blocks)).astype(int)).tolist()
    ends = [min((block + 1) * digest.stride, digest.records) - 1 for block in picks]
    return [(int(np.nan_to_num(digest.scalars[0, end])), means[block]) for block, end in zip(picks, ends, strict=True)]


def _sum(tables: Float[np.ndarray, "tables records layers experts"]) -> tuple[np.ndarray, np.ndarray]:
    """Sum over records of the entries that a mean counts, NaN where no record knows one; number of those entries."""
    finite = np.isfinite(tables)
    counted = finite.copy()
    counted[TABLES.index("expert_surprise")] &= tables[TABLES.index("expert_surprise")] > 0
    return np.where(finite.any(axis=1), np.where(counted, tables, 0.0).sum(axis=1), np.nan), counted.sum(
        axis=1, dtype=float
    )


def _mean(sums: np.ndarray, known: np.ndarray) -> np.ndarray:
    return sums / np.maximum(known, 1)


def _blocks(digest: Digest, new: Float[np.ndarray, "tables records layers experts"]) -> tuple[int, Any, Any]:
    """(records of a block, sums, known) with the new records added; neighbours are merged where blocks are many."""
    stride, sums, known, end = digest.stride, digest.sums, digest.known, digest.records + new.shape[1]
    while (end - 1) // stride >= 2 * BLOCKS:
        odd = ((0, 0), (0, sums.shape[1] % 2), (0, 0), (0, 0))
        sums = _pair(np.pad(sums, odd, constant_values=np.nan))
        known = np.pad(known, odd)
        known, stride = known[:, ::2] + known[:, 1::2], 2 * stride
    first = digest.records // stride
    parts = [
        _sum(new[:, max(b * stride - digest.records, 0) : (b + 1) * stride - digest.records])
        for b in range(first, (end - 1) // stride + 1)
    ]
    more, counts = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
    if first < sums.shape[1]:
        more[:, 0] = _pair(np.stack([sums[:, first], more[:, 0]], axis=1))[:, 0]
        counts[:, 0] += known[:, first]
    return stride, np.concatenate([sums[:, :first], more], axis=1), np.concatenate([known[:, :first], counts], axis=1)


def _pair(sums: np.ndarray) -> np.ndarray:
    """Sums of neighbouring blocks, NaN where neither is known."""
    left, right = sums[:, ::2], sums[:, 1::2]
    return np.where(np.isnan(left), right, left + np.nan_to_num(right))


def _layers(record: Mapping[str, Any], count: int) -> list[float]:
    """Co-activation of every layer of a record, NaN where unknown."""
    values = record.get("co_activation_layers")
    if not isinstance(values, list) or len(values) != count:
        return [math.nan] * count
    return numbers([{"layer": value} for value in values], "layer").tolist()
