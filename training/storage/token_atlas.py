"""token_atlas.csv of a run: one row for each (layer, token id, expert) that was visited on held-out text."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from training.errors import UserError
from training.storage.atomic import write_text
from training.storage.regular_file import read_small

FILE = "token_atlas.csv"
HEAD = ("layer", "token_id", "token", "occurrences", "expert", "visits", "benefit", "standard_error")

WHOLE = ("layer", "token_id", "occurrences", "expert", "visits")


class Visits(NamedTuple):
    """Visits of a token id to an expert of a layer."""

    layer: int
    token_id: int
    occurrences: int  # of the token id
    expert: int
    visits: int
    benefit: float  # signed benefit, mean over the visits, in nats; the lower, the more the expert helps
    standard_error: float | None  # of that mean; None of a single visit
    token: str = ""  # as it is spelled


def write_atlas(rows: Sequence[Visits], spell: Callable[[int], str], folder: Path) -> None:
    """Write the table; `spell` gives the text of a token id."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    for row in rows:
        error = "" if row.standard_error is None else f"{row.standard_error:.6g}"
        numbers = row.occurrences, row.expert, row.visits, f"{row.benefit:.6g}", error
        writer.writerow((row.layer, row.token_id, repr(spell(row.token_id))[1:-1], *numbers))
    write_text(folder / FILE, file.getvalue())


def read_atlas(folder: Path) -> list[Visits]:
    """The rows of a run's table; none where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        lines = csv.DictReader(io.StringIO(read_small(path).decode("utf-8"), newline=""))
        return [_visits(line) for line in lines]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        wanted = f"columns {', '.join(HEAD)}"
        raise UserError(f"{path}: expected {wanted}, got another table ({error}); remove the file") from None


def _visits(line: dict[str, str]) -> Visits:
    layer, token, occurrences, expert, visits = (int(line[key]) for key in WHOLE)
    error = float(line["standard_error"]) if line["standard_error"] else None
    return Visits(layer, token, occurrences, expert, visits, float(line["benefit"]), error, line["token"])
