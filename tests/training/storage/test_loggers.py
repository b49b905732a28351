"""Loggers show a run's records elsewhere, and neither their errors nor their slowness reach the run."""

import csv
import io
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.cli import main
from training.errors import UserError
from training.run.config import RunConfig
from training.storage import hosted_logger, loggers
from training.storage.csv_logger import CsvLogger
from training.storage.hosted_logger import HostedLogger
from training.storage.logger import ARRAYS_EVERY, LoggedRun, arrays, scalars
from training.storage.loggers import LOGGERS, Loggers, check_installed, logger_names
from training.storage.recorder import open_recorder

LOAD = torch.arange(12.0).reshape(3, 4)  # layers and experts


class Kept:
    """A logger that keeps what it is given; `broken` names the method that raises."""

    def __init__(self, broken: str = "", pause: float = 0.0) -> None:
        self.broken, self.pause = broken, pause
        self.calls: list[tuple] = []

    def start(self, run: LoggedRun) -> None:
        self._call("start", run)

    def log(self, step: int, record: Any) -> None:
        time.sleep(self.pause)
        self._call("log", step)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, name: str, *args: object) -> None:
        self.calls.append((name, *args))
        if name == self.broken:
            raise RuntimeError("the service is down\nTraceback of the service")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch):
    """Make a logger the one called csv."""

    def put(logger: Kept) -> Kept:
        monkeypatch.setitem(LOGGERS, "csv", lambda: logger)
        return logger

    return put


def written(folder: Path, steps: range, names: tuple[str, ...], resume_step: int | None = None, **more: Any) -> None:
    settings = {"lr": 0.1, "model": {"hidden_size": 8}}
    with open_recorder(folder, resume_step=resume_step, loggers=names, settings=settings) as recorder:
        for step in steps:
            extra = {"held_out_nats": 2.0} if step % 5 == 0 else {}
            recorder.write(step, step * 10, step / 4, {"loss": 1 / step, "load": LOAD} | extra | more)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", ()),
        ("tensorboard", ("tensorboard",)),
        ("csv, wandb,trackio", ("csv", "wandb", "trackio")),
        ("", None),
        ("csv,", None),
        ("csv,csv", None),
        ("none,csv", None),
        ("mlflow", None),
    ],
)
def test_loggers_are_named_with_commas(text: str, names: tuple[str, ...] | None) -> None:
    assert logger_names(text) == names


def test_an_unknown_logger_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"--out={tmp_path / 'run'}", "--log", "csv,mlflow"]) == 2
    line = "tiny-onn: --log: expected none, or some of tensorboard, csv, trackio, wandb with commas between, got "
    assert capsys.readouterr().err.startswith(line)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_logger_without_its_package_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    assert main(["train", f"--out={tmp_path / 'run'}", f"--log=csv,{name}"]) == 2
    line = f"tiny-onn: log: expected the package {name}, found none; pip install {name}, or leave it away\n"
    assert capsys.readouterr().err == line
    assert [*tmp_path.iterdir()] == []


def test_only_the_packages_that_are_asked_for_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    check_installed(("tensorboard", "csv"))
    with pytest.raises(UserError, match="expected the package wandb"):
        check_installed(("csv", "wandb"))


def test_a_run_logs_to_tensorboard_alone_by_default() -> None:
    assert logger_names(RunConfig().log) == ("tensorboard",)


# Not in the way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["start", "log", "finish"])
def test_a_logger_that_raises_is_switched_off_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept, broken: str
) -> None:
    logger = kept(Kept(broken))
    written(tmp_path, range(1, 9), ("csv",))
    assert capsys.readouterr().err == (
        "warning: no more csv from here on (the service is down); metrics.jsonl is kept all the same\n"
    )
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 8
    assert logger.calls[-1][0] == broken
    assert "csv" not in {thread.name for thread in threading.enumerate()}


def test_a_logger_that_ends_the_interpreter_ends_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = kept(Kept())
    monkeypatch.setattr(logger, "start", lambda run: sys.exit(3))
    written(tmp_path, range(1, 4), ("csv",))
    assert "no more csv from here on (3)" in capsys.readouterr().err


def test_a_slow_logger_slows_no_step_and_says_what_it_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "MOST_WAITING", 4)
    logger = kept(Kept(pause=0.2))
    with open_recorder(tmp_path, loggers=("csv",)) as recorder:
        start = time.perf_counter()
        for step in range(1, 31):
            recorder.write(step, 0, 0.0, {"loss": 1.0})
        assert time.perf_counter() - start < 3.0  # 6 s of the logger
    logged = sum(call[0] == "log" for call in logger.calls)
    assert logged < 30
    assert logger.calls[-1] == ("finish",)
    said = f"warning: csv was slower than the steps: {30 - logged} records were dropped; metrics.jsonl has all\n"
    assert capsys.readouterr().err == said


def test_the_end_of_a_run_waits_for_a_logger_only_so_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    released = threading.Event()
    logger = kept(Kept())
    monkeypatch.setattr(logger, "start", lambda run: released.wait(60))
    start = time.perf_counter()
    written(tmp_path, range(1, 4), ("csv",))
    assert time.perf_counter() - start < 10
    assert capsys.readouterr().err == (
        "warning: csv is still busy 0 s after the last step: 3 records are not there; metrics.jsonl has all\n"
    )
    released.set()


def test_loggers_are_ended_once(tmp_path: Path, kept) -> None:
    logger = kept(Kept())
    both = Loggers(("csv",), LoggedRun(tmp_path, {}))
    both.finish()
    both.finish()
    assert [call[0] for call in logger.calls] == ["start", "finish"]


# What they show -------------------------------------------------------------------------------------------------------


def test_numbers_are_scalars_and_tables_come_whole_now_and_then() -> None:
    record = {"step": 50, "loss": 0.5, "lost": None, "load": [[1.0, None], [2.0, 3.0]], "empty": []}
    assert scalars(record) == {"loss": 0.5}
    assert arrays(ARRAYS_EVERY, record) == {"load": [1.0, 2.0, 3.0]}
    assert arrays(1, record) == {"load": [1.0, 2.0, 3.0]}
    assert arrays(ARRAYS_EVERY + 1, record) == {}


def rows(folder: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO((folder / "metrics.csv").read_text(encoding="utf-8")))]


def test_the_table_has_a_row_a_step_and_a_column_a_number(tmp_path: Path) -> None:
    written(tmp_path, range(1, 8), ("csv",))
    table = rows(tmp_path)
    assert [row["step"] for row in table] == [str(step) for step in range(1, 8)]
    assert [*table[0]] == ["step", "tokens", "seconds", "loss", "held_out_nats"]
    assert [row["held_out_nats"] for row in table] == ["", "", "", "", "2.0", "", ""]
    assert float(table[1]["loss"]) == 0.5


def test_the_table_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    written(tmp_path, range(1, 8), ("csv",))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,80")  # torn by a kill
    written(tmp_path, range(5, 10), ("csv",), resume_step=4, late=3)
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == [*range(1, 10)]
    assert [row["late"] for row in table] == [""] * 4 + ["3"] * 5


@pytest.mark.parametrize("content", ["", "no table\n1\n", "\0\0\0"])
def test_a_table_that_is_none_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    logger = CsvLogger()
    logger.start(LoggedRun(tmp_path, {}, 3))
    logger.log(4, {"loss": 1.0})
    logger.finish()
    assert rows(tmp_path) == [{"step": "4", "loss": "1.0"}]


def test_tensorboard_shows_tables_as_histograms_and_no_key_an_expert(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hook = threading.excepthook
    written(tmp_path, range(1, 52), ("tensorboard",))
    assert threading.excepthook == hook
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["held_out_nats", "loss"]
    assert board.Tags()["histograms"] == ["load"]
    looks = board.Histograms("load")
    assert [look.step for look in looks] == [1, 50]
    assert (looks[0].histogram_value.num, looks[0].histogram_value.max) == (12, 11)
    assert [event.step for event in board.Scalars("loss")] == [*range(1, 52)]


def test_a_disk_that_refuses_tensorboards_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back, as a logger that broke does not
    monkeypatch.setattr(RecordWriter, "write", full)
    written(tmp_path, range(1, 9), ("tensorboard",))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: no more tensorboard from here on ([Errno 28] No space left on device)" in err


# Hosted ---------------------------------------------------------------------------------------------------------------


class Library(SimpleNamespace):
    """The part of trackio and wandb that is used."""

    def __init__(self, last_step: int = 0) -> None:
        super().__init__(inits=[], logged=[], finished=0, last_step=last_step)

    def Settings(self, **values: object) -> dict[str, object]:
        return values

    def Histogram(self, sequence: list[float]) -> tuple[str, int]:
        return "histogram", len(sequence)

    def init(self, **values: Any) -> "Library":
        print("the library greets")
        self.inits.append(values)
        self.step = self.last_step
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    there = Library()
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosted_logger, "_library", lambda name: there)
    return there


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_hosted_run_gets_settings_scalars_and_histograms(
    tmp_path: Path, library: Library, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    written(tmp_path / "mine", range(1, 4), (name,))
    (begun,) = library.inits
    assert begun["config"] == {"lr": 0.1, "model": {"hidden_size": 8}}
    assert (begun["project"], begun["resume"]) == ("tiny-onn", "allow")
    assert begun["name"].startswith("mine")
    step, values = library.logged[0]
    assert (step, values) == (1, {"tokens": 10, "seconds": 0.25, "loss": 1.0, "load": ("histogram", 12)})
    assert [step for step, _ in library.logged] == [1, 2, 3]
    assert "load" not in library.logged[1][1]
    assert library.finished == 1
    assert capsys.readouterr().out == ""  # standard output is for results


@pytest.mark.parametrize(("name", "key"), [("trackio", "name"), ("wandb", "id")])
def test_a_resumed_run_goes_on_as_the_same_hosted_run(tmp_path: Path, library: Library, name: str, key: str) -> None:
    written(tmp_path / "a", range(1, 4), (name,))
    library.last_step = 4
    written(tmp_path / "a", range(3, 6), (name,), resume_step=2)
    written(tmp_path / "b" / "a", range(1, 2), (name,))
    first, again, other = (begun[key] for begun in library.inits)
    assert first == again != other
    assert [step for step, _ in library.logged] == [1, 2, 3, 4, 5, 1]  # step 3 is there already


def test_an_identity_that_is_none_is_made_anew(tmp_path: Path, library: Library) -> None:
    (tmp_path / ".log-id").write_text("../../elsewhere")
    logger = HostedLogger("wandb")
    logger.start(LoggedRun(tmp_path, {}, 3))
    assert hosted_logger.FORM.fullmatch(library.inits[0]["id"])


def test_the_project_is_that_of_the_environment(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    written(tmp_path, range(1, 2), ("trackio",))
    assert library.inits[0]["project"] == "ours"
