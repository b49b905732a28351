"""results.csv: one row a run, read and written."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.fields import Field
from training.storage.atomic import write_text
from training.storage.regular_file import read_small

RESULTS, NEEDED = "results.csv", ("run", "arm", "seed", "status")
MEND = "remove the file, --resume makes it anew"
MEASURES = {  # of a run, in the order of the columns
    "nats_per_token": Field("nats per token", "Held-out loss; comparable between runs of one tokenizer."),
    "bits_per_byte": Field(
        "bits per byte",
        "Held-out loss per byte of the scored text; comparable between tokenizers.",
    ),
    "avg_k": Field("experts per token", "Experts that a held-out token visits, mean over layers and tokens."),
    "max_vio": Field("ratio", "Mean of `max_vio` over the last 20 records."),
    "dead_experts": Field("(layer, expert) pairs", "Pairs without a visit in all of the last 20 records."),
    "gating_acc": Field("share", "Mean of `gating_acc` over the last 20 records."),
    "gating_trivial": Field("share", "Mean of `gating_trivial` over the last 20 records."),
    "active_parameters": Field("parameters", "Parameters that a token uses at this `avg_k`."),
    "flops_per_token": Field("operations", "Floating point operations of a token's forward pass at this `avg_k`."),
    "load_entropy": Field(
        "0 to 1",
        "Entropy of the load over log E, mean over layers and the last 20 records; 1 is even.",
    ),
    "regret": Field(
        "nats",
        "Oracle regret of the router's first choice: a sampled token's loss there, above its best expert's.",
    ),
    "regret_random": Field("nats", "Oracle regret of an expert drawn at random."),
    "regret_w2": Field("nats", "Oracle regret of the least surprised visited expert (kind w2)."),
    "oracle_hits": Field("share", "Share of sampled tokens whose first choice is the best expert by the oracle."),
    "co_activation": Field(
        "nats",
        "Excess co-activation: divergence of the pairs of experts that tokens visit together from what the loads "
        "alone would give, mean over layers; 0 is chance.",
    ),
    "routing_drift": Field(
        "share",
        "Routing drift: share of held-out tokens whose first choice changed between the last two scores during "
        "the run.",
    ),
    "seconds": Field("s", "Training time of the run: its share of its group's."),
    "status": Field("text", "`finished`, `diverged` or `unfinished`."),
}  # fmt: skip
IDENTITY = {  # columns before the measures
    "run": Field("text", "Name of the run, and of its folder in `runs/`."),
    "arm": Field("text", "Label of the arm, with the values of its axes."),
    "order": Field("text", "Tasks in the order in which they were learned; in studies with `tasks`."),
    "seed": Field("integer", "Seed of the parameters and of the batches."),
}
OVERRIDES = Field(
    "as the setting",
    "A column for each setting that an arm or an axis changes, under its dotted name: the run's value.",
)
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
