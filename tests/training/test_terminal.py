"""Log and progress: a bar on a terminal, plain lines elsewhere, nothing but errors when quiet."""

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import terminal
from training.cli import main
from training.errors import UserError
from training.terminal import LOG, PlainLines, progress, set_verbosity


@pytest.fixture(autouse=True)
def _usual_verbosity() -> Iterator[None]:
    yield
    set_verbosity()


class Terminal(io.StringIO):
    """An error stream with a person in front of it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the day, which stand still until a test moves them."""
    now = [100.0]
    monkeypatch.setattr("training.terminal.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_every_thirty_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert terminal.EVERY == 30.0
    with progress(total=2000, initial=200, unit="step") as bar:
        for _ in range(485):  # eight steps a second, for a minute
            clock[0] += 0.125
            bar.set_postfix_str("loss 2.5", refresh=False)
            bar.update()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 440 of 2,000, loss 2.5, 03:15 left",
        "step 680 of 2,000, loss 2.5, 02:45 left",
        "step 685 of 2,000, loss 2.5, 02:44 left",
    ]
    assert "\r" not in err


def test_the_last_line_says_where_the_loop_ended(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=4, unit="step") as bar:
        for seconds in (31.0, 1.0, 1.0):
            clock[0] += seconds
            bar.update()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["step 1 of 4", "step 3 of 4"]


def test_a_loop_of_less_than_thirty_seconds_has_no_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=4, unit="step") as bar:
        clock[0] += 29.0
        bar.update(4)
    assert capsys.readouterr().err == ""


def test_a_line_names_what_is_under_way_and_counts_bytes_in_their_units(clock: list[float]) -> None:
    bar = PlainLines(total=3_000_000, desc="tokenizing", unit="B", unit_scale=True)
    clock[0] += 10.0
    bar.update(1_500_000)
    assert bar.text() == "tokenizing: 1.50MB of 3.00MB, 00:10 left"
    bar.set_description("group 1/2")
    assert bar.text().startswith("group 1/2: ")
    assert PlainLines(unit="batch").text() == "batch 0"


def test_what_is_iterated_comes_through_and_is_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            clock[0] += 40.0
            yield number

    assert [*progress(slow(), desc="held-out score", unit="batch")] == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == [f"held-out score: batch {n}" for n in (1, 2, 3)]
    assert [*progress([])] == []


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress(total=3, unit="step", desc="group") as bar:
        bar.update(3)
        LOG.warning("ALARM")
    assert "group: 100%" in screen.getvalue()
    assert "\r" in screen.getvalue()
    assert "ALARM\n" in screen.getvalue()
    assert [*progress([1, 2])] == [1, 2]
    assert [*progress([])] == []


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_and_hidden_bars_write_nothing(
    is_terminal: bool, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)

    def shown(**options: bool) -> str:
        with progress(total=3, unit="step", **options) as bar:
            clock[0] += 31.0
            bar.update(3)
        return screen.getvalue()

    assert shown(shown=False) == ""
    set_verbosity(quiet=True)
    assert shown() == ""
    set_verbosity()
    assert shown() != ""


def test_quiet_keeps_errors_and_verbose_adds_details(capsys: pytest.CaptureFixture[str]) -> None:
    def lines() -> list[str]:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            LOG.log(level, logging.getLevelName(level))
        return capsys.readouterr().err.split()

    assert lines() == ["INFO", "WARNING", "ERROR"]
    set_verbosity(quiet=True)
    assert lines() == ["ERROR"]
    set_verbosity(verbose=True)
    assert lines() == ["DEBUG", "INFO", "WARNING", "ERROR"]
    with pytest.raises(UserError, match="--quiet: expected no --verbose with it, got both; leave one away"):
        set_verbosity(quiet=True, verbose=True)


def test_a_closed_error_stream_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.close()
    for stream in (screen, None):
        monkeypatch.setattr(sys, "stderr", stream)
        LOG.warning("nobody hears it")


VERBS = ("train", "evaluate", "generate", "export", "tokenizer", "surgery", "study", "rerun", "doctor", "report")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_quiet_and_verbose(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    page = capsys.readouterr().out
    assert all(flag in page for flag in ("-q, --quiet", "-v, --verbose"))


@pytest.mark.parametrize("words", [["-v", "evaluate", "nowhere"], ["evaluate", "nowhere", "--verbose"]])
def test_verbose_says_where_an_error_comes_from(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tiny-onn: nowhere: expected a run folder")
    assert "Traceback (most recent call last):" in trace
    assert main(["evaluate", "nowhere", "-q"]) == 2
    assert capsys.readouterr().err == f"{line}\n"
    assert LOG.level == logging.INFO, "-q is of one command"
    assert main(["evaluate", "nowhere"]) == 2, "the next command begins with the usual verbosity"
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("words", [["train", "-q", "-v"], ["-q", "train", "--verbose"], ["doctor", "-qv"]])
def test_quiet_and_verbose_together_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == "tiny-onn: --quiet: expected no --verbose with it, got both; leave one away\n"


def test_a_value_that_looks_like_a_switch_is_a_value() -> None:
    from training.run.settings import parse_train_args

    assert parse_train_args(["--prompt", "-q"])[0].prompt == "-q"
    assert LOG.level == logging.INFO
    parse_train_args(["-q"])
    assert LOG.level == logging.ERROR


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from training.storage.checkpoint_files import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tiny-onn {version()}\n"


def test_no_module_prints_to_the_error_stream_beside_the_log() -> None:
    home = Path(terminal.__file__).parent
    beside = [path.name for path in home.rglob("*.py") if "file=sys.stderr)" in path.read_text("utf-8")]
    assert beside == ["terminal.py"]
