"""Records -> arrays that can be drawn: at most a given number of columns, NaN where nothing is known."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

Records = Sequence[Mapping[str, Any]]

LARGEST = 1e30  # beyond it a number is taken for unknown: drawing libraries overflow there


class Columns(NamedTuple):
    """Neighbouring records gathered into columns: column c holds the records starts[c] to starts[c + 1] - 1."""

    starts: Int[np.ndarray, " columns"]
    x: Float[np.ndarray, " columns"]  # mean step of the column
    edges: Float[np.ndarray, " edges"]  # steps between which the columns lie, one more than columns
    name: str  # what x counts


def columns(history: Records, most: int) -> Columns:
    """At most `most` columns of as equal size as can be; x counts records where steps are absent or do not rise."""
    return columns_of(numbers(history, "step"), most)


def columns_of(step: Float[np.ndarray, " records"], most: int) -> Columns:
    """`columns` of records of these steps."""
    count, name = len(step), "step"
    if not (np.isfinite(step).all() and (np.abs(step) < 1e15).all() and (np.diff(step) > 0).all()):
        step, name = np.arange(1.0, count + 1), "record"
    starts = np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.int64)[:-1])
    if count == 0:
        return Columns(starts[:0], step, np.array([0.0, 1.0]), name)
    between = (step[starts[1:]] + step[starts[1:] - 1]) / 2
    half = (step[-1] - step[0]) / max(count - 1, 1) / 2 or 0.5
    edges = np.concatenate(([step[0] - half], between, [step[-1] + half]))
    return Columns(starts, gather(step, starts), edges, name)


def numbers(history: Records, key: str) -> Float[np.ndarray, " records"]:
    """The scalar of every record; NaN where it is absent, no number, or not finite."""
    return np.array([_number(record.get(key)) for record in history], dtype=float)


def gather(values: Float[np.ndarray, "records *shape"], starts: Int[np.ndarray, " columns"]) -> np.ndarray:
    """Mean of the known values of each column, NaN where there is none."""
    if not len(starts):
        return values[:0]
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    count = np.add.reduceat(known.astype(float), starts, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def smooth(values: Float[np.ndarray, " columns"]) -> Float[np.ndarray, " columns"]:
    """Centred mean over a fortieth of the columns; over fewer at the beginning, where curves are steep.

    Unknown values are left out of the means and stay unknown.
    """
    at = np.arange(len(values))
    half = np.minimum(at, max(2, len(values) // 80))
    first, behind = at - half, np.minimum(at + half + 1, len(values))
    known = np.isfinite(values)
    total, count = (np.concatenate(([0.0], np.cumsum(part))) for part in (np.where(known, values, 0.0), known))
    return np.where(known, (total[behind] - total[first]) / np.maximum(count[behind] - count[first], 1), np.nan)


def table_shape(history: Records, keys: Sequence[str]) -> tuple[int, int] | None:
    """(L, E) of the last record that has one of the tables; None if none has."""
    for record in reversed(history):
        for key in keys:
            table = _table(record.get(key))
            if table is not None:
                return table.shape[0], table.shape[1]
    return None


def tables(history: Records, key: str, shape: tuple[int, int]) -> Float[np.ndarray, "records layers experts"]:
    """The (L, E) table of every record, NaN where it is absent or of another shape."""
    out = np.full((len(history), *shape), np.nan)
    for index, record in enumerate(history):
        table = _table(record.get(key))
        if table is not None and table.shape == shape:
            out[index] = table
    return out


def column_tables(
    history: Records, key: str, shape: tuple[int, int], starts: Int[np.ndarray, " columns"], most: int
) -> Float[np.ndarray, "columns layers experts"]:
    """Mean table of each column, over evenly spaced records of it where all would be more than `most` numbers."""
    if not len(starts):
        return np.full((0, *shape), np.nan)
    sizes = np.diff(np.append(starts, len(history)))
    read = np.minimum(sizes, max(1, most // (len(starts) * shape[0] * shape[1])))
    picks = [start + np.arange(n) * size // n for start, size, n in zip(starts, sizes, read, strict=True)]
    sample = [history[index] for index in np.concatenate(picks)]
    return gather(tables(sample, key, shape), np.cumsum(read) - read)


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        return np.nan
    return float(value) if abs(value) < LARGEST else np.nan


def _table(value: Any) -> np.ndarray | None:
    """A non-empty nested list as a matrix, None for anything else; unknown entries are NaN."""
    try:
        table = np.array(value, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return None
    if table.ndim != 2 or not table.size:
        return None
    return np.where(np.abs(table) < LARGEST, table, np.nan)
