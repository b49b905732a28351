"""A run ends after so many held-out scores in a row that are no better than the best, as any run ends."""

import json
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import assert_same_bits
from tests.training.run.test_engine import records, train
from training.cli import main
from training.run.context import scores_since_best
from training.run.evaluate import Score
from training.run.summary import held_out_score
from training.storage.checkpoint import load_checkpoint
from training.storage.checkpoint_files import steps_in

pytestmark = pytest.mark.usefixtures("own_cache")
EVERY_TWO = ("--steps=40", "--eval-every=2", "--sample-tokens=0", "--picture-every=0", "--checkpoint-every=0")


def scored(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the scores during the run be these, and then the last one again and again."""
    coming = chain(scores, repeat(scores[-1]))
    monkeypatch.setattr(
        "training.run.loop.held_out_score", lambda *_: Score(next(coming), 1.0, 0.5, 2.0, tokens=9, bytes=9)
    )


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("scores", "stop_when", "step", "best"),
    [
        ((3.0, 2.5, 2.6, 2.4, 2.5, 2.5, 2.5), 3, 14, 8),  # the count begins anew at a new best
        ((3.0, 2.0, 2.0, 2.0), 2, 8, 4),  # as good as the best is no better
        ((3.0, float("nan")), 1, 4, 2),  # nor is what is no number
        ((3.0, 2.0, 1.0), 3, 12, 6),
    ],
)
def test_a_run_stops_after_so_many_scores_that_are_no_better(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    scores: tuple[float, ...], stop_when: int, step: int, best: int,
) -> None:  # fmt: skip
    scored(monkeypatch, *scores)
    out = tmp_path / "run"
    assert train(text, out, *EVERY_TWO, f"--stop-when={stop_when}") == 0
    assert [record["step"] for record in records(out)] == list(range(1, step + 1))
    assert steps_in(out / "checkpoints")[-1][0] == step
    about = summary(out)
    assert (about["steps"], about["best_step"]) == (step, best)
    reason = f"{stop_when} held-out scores in a row no better than {min(scores[:4]):.4f} nats per token at step {best}"
    assert about["stopped"] == {"step": step, "reason": f"{reason} (stop_when)"}
    printed = capsys.readouterr()
    assert f"stopped early      after step {step}: {reason}" in printed.out
    assert f"note: stopped after step {step} of 40: {reason}" in printed.err
    assert about["bits_per_byte"] > 0


@pytest.mark.parametrize("flags", [("--stop-when=0",), ("--stop-when=9", "--steps=12"), ("--stop-when=2",)])
def test_a_run_with_better_scores_or_without_the_setting_makes_all_of_its_steps(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """The negative twin."""
    if flags == ("--stop-when=2",):
        scored(monkeypatch, *(3.0 - step / 100 for step in range(30)))
    else:
        scored(monkeypatch, 3.0)
    assert train(text, tmp_path / "run", *EVERY_TWO, "--steps=12", *flags) == 0
    about = summary(tmp_path / "run")
    assert (about["steps"], about["stopped"]) == (12, None)


def test_a_stopped_run_that_is_resumed_is_finished_or_goes_on_with_another_patience(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(monkeypatch, 2.0)
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--steps=12", *EVERY_TWO[1:])
    assert train(text, out, *flags, "--stop-when=2") == 0
    before = load_checkpoint(out)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "note: stopped after step 6 of 12: 2 held-out scores in a row" in capsys.readouterr().err
    assert_same_bits(load_checkpoint(out), before)
    assert summary(out)["stopped"]["step"] == 6
    assert main(["train", "--out", str(out), "--resume", "--stop-when=3"]) == 0
    assert summary(out)["stopped"]["step"] == 8, "the scores before count"
    assert main(["train", "--out", str(out), "--resume", "--stop-when=0"]) == 0
    assert (summary(out)["steps"], summary(out)["stopped"]) == (12, None)
    assert train(text, whole, *flags) == 0
    assert_same_bits(load_checkpoint(out), load_checkpoint(whole))


def test_a_killed_run_counts_the_scores_of_its_record(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def until_the_third(*inputs: Any) -> Score:
        counted.append(1)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return held_out_score(*inputs)._replace(nats_per_token=2.0)

    counted: list[int] = []
    monkeypatch.setattr("training.run.loop.held_out_score", until_the_third)
    out = tmp_path / "run"
    assert train(text, out, *EVERY_TWO, "--stop-when=3") == 130
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert summary(out)["stopped"]["step"] == 8


def test_scores_are_counted_from_the_best_one_on() -> None:
    nats = (2.0, None, 1.5, 1.5, None, 1.6)
    history = [{"step": step} | ({"held_out_nats": value} if step % 2 else {}) for step, value in enumerate(nats * 2)]
    assert scores_since_best([]) == 0
    assert scores_since_best([{"step": 1}]) == 0
    scores = [{"step": step, "held_out_nats": value} for step, value in enumerate(nats)]
    assert [scores_since_best(scores[:end]) for end in range(1, 7)] == [0, 1, 0, 1, 2, 3]
    assert scores_since_best(history) == scores_since_best([r for r in history if "held_out_nats" in r])


def test_a_study_has_no_early_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text("name: x\nmargin: 0.1\nseeds: [0]\nbase: {stop_when: 3}\n", encoding="utf-8")
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "base.stop_when: expected 0 in a study, got 3; the runs of a group end together" in capsys.readouterr().err
