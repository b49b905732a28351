"""Clumsy commands: the answer is one line that names what was typed, and following its advice works."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.training.run.test_engine import TEXT, train
from training.cli import main
from training.data.batches import count_held_out_batches, held_out_batches
from training.data.corpus import open_corpus
from training.run import loop


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    home = tmp_path_factory.mktemp("run")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(home / "cache"))
        assert train(home / "text.txt", home / "run", "--steps=2", "--eval-every=0", "--sample-tokens=0") == 0
    return home / "run"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    "typed",
    [
        ["generate", "--temperature=-1"],
        ["generate", "--temperature=nan"],
        ["generate", "--top-k=0"],
        ["generate", "--top-p=1.5"],
        ["generate", "--repetition-penalty=0"],
        ["evaluate", "--holdout=2"],
        ["evaluate", "--holdout=nan"],
    ],
    ids=lambda typed: typed[1],
)
def test_a_flag_out_of_range_is_named_as_it_was_typed(
    typed: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, flag = typed
    assert refused([verb, str(run), flag], capsys).startswith(f"tiny-onn: {flag.partition('=')[0]}: expected ")


@pytest.mark.parametrize("files", [1, 3, 12, 40])
def test_flags_that_evaluate_advises_for_a_folder_of_tiny_files_work(
    files: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(files):
        (folder / f"{number}.txt").write_text(f"note {number}\n", encoding="utf-8")
    words = ["evaluate", str(run), "--data", str(folder)]
    said = refused([*words, "--holdout", "0.001"], capsys)
    advised = re.search(r"--split tail --holdout [\d.]+", said)
    assert (advised is not None) == (files * len("note 0\n") > 40), "a sequence and its target on each side"
    if advised:
        assert main([*words, *shlex.split(advised[0])]) == 0
    assert "--all, which scores all of it" in said
    assert main([*words, "--all"]) == 0


def test_settings_that_train_advises_for_a_short_text_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:100], encoding="utf-8")
    capsys.readouterr()
    assert train(text, tmp_path / "run", "--steps=1", "--sample-tokens=0") == 2
    said = capsys.readouterr().err
    assert "or split: tail and holdout: 0.2" in said
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert train(text, tmp_path / "run", "--steps=1", "--sample-tokens=0", "--split=tail", "--holdout=0.2") == 0


def test_a_text_too_short_for_any_score_is_refused_without_advice_that_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a", encoding="utf-8")
    said = refused(["evaluate", str(run), "--data", str(text), "--all"], capsys)
    assert said.endswith("; give more text\n")


def test_a_sample_that_cannot_be_written_does_not_take_the_summary_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("logits: expected finite numbers, got nan")

    monkeypatch.setattr("training.run.summary.generate", fail)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert train(tmp_path / "text.txt", tmp_path / "run", "--steps=2", "--eval-every=0", "--sample-tokens=9") == 0
    assert "warning: no sample text: logits: expected finite numbers, got nan\n" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["sample"] == ""
    assert summary["steps"] == 2


def test_resuming_a_finished_run_says_so_and_how_to_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--device=cpu"]) == 0
    said = capsys.readouterr().err
    assert "note: the run has made all of its 2 steps; go on with --resume and more --steps\n" in said
    assert "device      cpu (as set), float32 (as set)\n" in said


def test_an_alarm_rings_once_and_says_when_it_is_over(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history: list[dict[str, int]] = []
    coming = iter(
        [[], ["Dead experts: 4 of 16. Set x."], ["Dead experts: 5 of 16. Set x.", "One: y."], ["One: y."], []]
    )
    monkeypatch.setattr(loop, "alarms", lambda *_: next(coming))
    in_progress = loop.Run(None, run, None, history, {}, {})  # type: ignore[arg-type]
    ring = loop._bell(in_progress)
    capsys.readouterr()
    for step in (50, 100, 150, 200, 250):
        history.append({"step": step})
        ring()
    assert capsys.readouterr().err.splitlines() == [
        "ALARM at step 100: Dead experts: 4 of 16. Set x.",
        "ALARM at step 150: One: y.",
        "alarm over at step 200: Dead experts (it was on from step 100 on)",
        "alarm over at step 250: One (it was on from step 150 on)",
    ]


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 10_000])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_bar_of_a_held_out_score_counts_to_the_number_of_its_batches(
    max_bytes: int | None, batch_size: int, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "text.txt"), sequence_length=16).held_out
    made = sum(1 for _ in held_out_batches(corpus, batch_size, 16, max_bytes=max_bytes))
    assert count_held_out_batches(corpus, batch_size, 16, max_bytes) == made


def test_the_bar_of_training_fits_into_110_columns() -> None:
    how = "loss 2.98, bits/byte 4.31, avg_k 3.99, gating 0.621, surprise 0.0312, 15,707 tok/s"
    line = tqdm.format_meter(12_345, 28_000, 100.0, ncols=110, bar_format=loop.BAR, postfix=how)
    assert line.endswith(how)
    assert line.startswith("12345/28000 |")
    assert len(line) <= 110
