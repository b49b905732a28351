"""The records that a run holds in memory: of a long one the first, the last, the best, and every n-th between.

They are chosen by their steps alone, so a run that goes on holds what it would have held without a stop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

MOST, ENDS = 4096, 256  # records between the ends at most, of the first and of the last; all records up to MOST steps


def remember(history: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Append the record of a step; now and then let go of what is no longer needed."""
    history.append(record)
    now = record["step"]
    if now > MOST and now % ENDS == 0:
        stride, best = 1 << ((now - 1) // MOST).bit_length(), best_step(history)
        history[:] = [
            one
            for one in history
            if one["step"] % stride == 0 or one["step"] <= ENDS or one["step"] > now - ENDS or one["step"] == best
        ]


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the lowest held-out loss that was scored during the run; the first of equals."""
    scored = [record for record in history if isinstance(record.get("held_out_nats"), int | float)]
    return min(scored, key=lambda record: record["held_out_nats"])["step"] if scored else None
