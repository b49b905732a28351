"""`tiny-onn report`: the folder of a study or of a run -> report.html in it, and a few lines for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import UserError
from training.report.digest import Digest, empty_digest, extend
from training.report.html.page import Page
from training.report.html.run_page import RunFiles, run_page
from training.report.html.study_arms import Study
from training.report.html.study_page import study_page
from training.storage.atomic import write_text
from training.storage.cursor import Cursor, follow
from training.storage.plain_yaml import read_yaml
from training.storage.regular_file import read_object, read_small
from training.storage.results import RESULTS, UNFINISHED, Row, read_results
from training.storage.token_atlas import read_atlas

REPORT = "report.html"
ODD = (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)  # what a forged value of a file causes
NEEDED = ("arms", "against_baseline", "baseline", "margin", "question", "falsifier", "answer")  # of analysis.json


class Report(NamedTuple):
    """Path of a written report, and its lines for the terminal."""

    path: Path
    text: str  # for the terminal


def write_report(folder: str | Path) -> Report:
    """Write report.html into the folder of a study, or of a single run.

    Raises:
        UserError: the folder holds neither, or a file in it is damaged.
    """
    page, text = FolderReader(folder).read()
    path = Path(folder) / REPORT
    write_text(path, page.html())
    return Report(path, text)


class FolderReader:
    """The folder of a study or of a run, read again and again while it grows: every record once.

    Raises:
        UserError: the folder holds neither.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name, self.home = str(folder), Path(folder)
        self.records: dict[Path, tuple[Cursor, Digest]] = {}  # run folder -> end of what was read, and what it says
        study, run = (self.home / "study.yaml").is_file(), (self.home / "config.yaml").is_file()
        if not study and not run:
            raise UserError(
                f"{folder}: expected the folder of a study (study.yaml) or of a run (config.yaml), found neither; "
                "`tiny-onn study` and `tiny-onn train` make them"
            )
        self._make = _study if study else _run
        self._judged: tuple[object, Mapping[str, Any]] = (None, {})  # results and study.yaml -> their analysis

    def read(self) -> tuple[Page, str]:
        """The page as it is now, and the lines for the terminal.

        Raises:
            UserError: a file in the folder is damaged.
        """
        try:
            return self._make(self)
        except ODD as error:
            came = f"values that they do not write ({type(error).__name__}: {error})"
            wanted = "results, summaries and records as `tiny-onn study` and `tiny-onn train` write them"
            raise UserError(f"{self.name}: expected {wanted}, got {came}; restore or remove those files") from error

    def digest(self, folder: Path) -> Digest:
        """The records of a run, of which the new ones alone are read; of none where it has not begun."""
        cursor, digest = self.records.get(folder, (Cursor(), empty_digest()))
        for batch in follow(folder, cursor):
            digest = extend(empty_digest() if batch.restarted else digest, batch.records)
            self.records[folder] = (batch.cursor, digest)
        return digest

    def analysis(self, rows: list[Row], text: str) -> Mapping[str, Any]:
        """analysis.json, which is made if there is none; that of a study under way is not written."""
        if all(row["status"] != UNFINISHED for row in rows):
            return _analysis(self.home)
        if self._judged[0] != (rows, text):
            from training.study.analysis import analyse_rows
            from training.study.file import load_study

            self._judged = (rows, text), analyse_rows(load_study(self.home / "study.yaml"), rows)
        return self._judged[1]


def _study(reader: FolderReader) -> tuple[Page, str]:
    from training.study.comparison.table import study_table

    home = reader.home
    rows = read_results(home)
    if not rows:
        raise UserError(
            f"{home / RESULTS}: expected one row a run, found none; `tiny-onn study --out {home} --resume` writes it"
        )
    text = _text(home / "study.yaml")
    analysis = reader.analysis(rows, text)
    study = Study(reader.name, read_yaml(str(home / "study.yaml")), text, analysis, rows)
    runs = home / "runs"
    page = study_page(
        study,
        lambda run: reader.digest(runs / run),
        lambda run: _summary(runs / run),
        lambda run: read_atlas(runs / run),
    )
    return page, study_table(analysis)


def _analysis(home: Path) -> Mapping[str, Any]:
    path = home / "analysis.json"
    if not path.exists():
        from training.study.analysis import analyse

        return analyse(home)
    analysis = read_object(path)
    if missing := [key for key in NEEDED if key not in analysis]:
        raise UserError(f"{path}: expected {missing[0]}, found none; remove the file, it is made anew")
    return analysis


def _run(reader: FolderReader) -> tuple[Page, str]:
    from training.run.schedule import Leg, read_legs, reproduction
    from training.run.settings import load_settings
    from training.run.summary import summary_table

    name, home = reader.name, reader.home
    described = home / "config.yaml"
    try:
        legs = read_legs(home, load_settings(str(described)))
    except UserError:  # shown as it is
        legs = (Leg(0, 0),)
    commands = reproduction(legs, str(described), f"{name.rstrip('/')}-again")
    run = RunFiles(name, _text(described), read_yaml(str(described)), _summary(home), reader.digest(home), commands)
    if run.summary.get("nats_per_token") is None:
        return run_page(run), f"{name}: no score{'' if run.summary else ' yet'}, {run.digest.records} records"
    return run_page(run), summary_table({"baselines": {}, "sample": "", "alarms": []} | dict(run.summary), name)


def _summary(folder: Path) -> dict[str, Any]:
    """The summary of a run; {} where it is not done."""
    path = folder / "summary.json"
    return read_object(path) if path.exists() else {}


def _text(path: Path) -> str:
    return read_small(path).decode("utf-8", "replace")
