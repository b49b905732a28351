"""results.csv: one row a run, read and written."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.storage.atomic import write_text
from training.storage.regular_file import read_small

RESULTS, NEEDED = "results.csv", ("run", "arm", "seed", "status")
MEND = "remove the file, --resume makes it anew"
MEASURES = (
    "nats_per_token", "bits_per_byte", "avg_k", "max_vio", "dead_experts", "gating_acc", "gating_trivial",
    "active_parameters", "flops_per_token", "load_entropy", "regret", "regret_random", "regret_w2", "oracle_hits",
    "co_activation", "routing_drift", "seconds", "status",
)  # fmt: skip
FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"
Row = dict[str, Any]


def pair_key(row: Mapping[str, Any]) -> str:
    """Key that both rows of a pair share: the seed, and the order of the tasks if there is one."""
    return f"{row['seed']}, {row['order']}" if row.get("order") else str(row["seed"])


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
