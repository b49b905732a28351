"""Load and company of the experts over time, layer by layer: records -> numbers of every layer -> charts.

With p the shares of a layer's routed rows that its E experts got:

    load entropy  = -sum_e p_e log p_e / log E           1: an even load, 0: one expert takes all
    MaxVio        = (max p - mean p) / mean p            0: an even load, E - 1: one expert takes all
    dead experts  = experts of the layer without a row in the batch
    co-activation = as `training.study.routing_analysis.coactivation_excess` has it, measured on held-out text
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from training.report.series import Records, table_shape, tables

LAYERED = (
    ("load entropy", "share of log E"),
    ("MaxVio", "(max − mean) / mean load"),  # noqa: RUF001
    ("dead experts", "without a row in the batch"),
    ("co-activation", "nats; 0 is chance"),
)


def shown_layers(count: int) -> list[int]:
    """The first, the middle and the last layer."""
    return sorted({0, count // 2, count - 1}) if count else []


def layer_key(measure: str, layer: int) -> str:
    """Under which `by_layer` has a measure of a layer."""
    return f"{measure}, layer {layer}"


def by_layer(history: Records) -> list[dict[str, Any]]:
    """Records with their step and the measures of LAYERED of every layer; [] where no record has a table of loads."""
    shape = table_shape(history, ("expert_load",))
    if shape is None:
        return []
    records = []
    for record, load in zip(history, tables(history, "expert_load", shape), strict=True):
        of_layers = measures(load) | {"co-activation": _layers(record, shape[0])}
        values = {layer_key(name, i): row[i] for name, row in of_layers.items() for i in range(shape[0])}
        records.append({"step": record.get("step"), **values})
    return records


def measures(load: Float[np.ndarray, "layers experts"]) -> dict[str, list[float | None]]:
    """Measure -> its value in every layer, None where the load is not known."""
    experts = load.shape[-1]
    p = load / np.where((total := load.sum(axis=-1, keepdims=True)) > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1) / (math.log(experts) if experts > 1 else 1.0)
    values = {
        "load entropy": np.where(experts > 1, entropy, p.sum(axis=-1)),
        "MaxVio": p.max(axis=-1) * experts - 1,
        "dead experts": np.where(np.isnan(p), np.nan, p == 0).sum(axis=-1),
    }
    return {name: [None if math.isnan(x) else x for x in row.tolist()] for name, row in values.items()}


def _layers(record: Mapping[str, Any], count: int) -> Sequence[Any]:
    values = record.get("co_activation_layers")
    return values if isinstance(values, list) and len(values) == count else [None] * count
