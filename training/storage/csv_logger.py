"""A run's scalars as a table: RUN/metrics.csv, a row a step and a column a number."""

import csv
from io import StringIO
from pathlib import Path
from typing import Any

from training.storage.atomic import write_text
from training.storage.logger import LoggedRun, Record, scalars

FILE = "metrics.csv"


class CsvLogger:
    """Logger that appends rows; a number that comes up later, as a held-out score, makes the table wider."""

    def start(self, run: LoggedRun) -> None:
        """Begin the table, or keep its rows up to the step from which a run goes on."""
        self._path, self._columns = run.folder / FILE, ["step"]
        rows: list[dict[str, str]] = []
        if run.resume_step is not None and self._path.exists():
            self._columns, rows = _read(self._path)
            rows = [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= run.resume_step]
        self._rewrite(rows)

    def log(self, step: int, record: Record) -> None:
        """Append a row."""
        row: dict[str, Any] = {"step": step, **scalars(record)}
        if new := [name for name in row if name not in self._columns]:
            self._file.close()
            rows = _read(self._path)[1]
            self._columns += new
            self._rewrite(rows)
        self._writer.writerow(row)
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace the table by these rows under all columns, and open it for more."""
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a table; a row that a killed process left torn is dropped."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row and None not in row.values()]
        columns = [*(reader.fieldnames or ())]
    return (columns, rows) if "step" in columns else (["step"], [])
