"""The doctor's advice for a broken summary or checkpoint works when it is followed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.training.run.test_engine import TEXT, train
from training.cli import main
from training.commands.doctor import Finding, examine


@pytest.fixture(autouse=True)
def _well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a machine with a compiler."""
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("training.commands.doctor._native", lambda: Finding("kernels", "kernels.so"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of four steps, with checkpoints of steps 2 and 4."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = ("--steps=4", "--checkpoint-every=2", "--eval-every=0", "--sample-tokens=0")
    assert train(tmp_path / "text.txt", tmp_path / "run", *flags) == 0
    return tmp_path / "run"


def faults(run: Path) -> list[Finding]:
    return [finding for finding in examine(run) if finding.advice]


def damage(run: Path, step: int) -> None:
    with (run / "checkpoints" / f"step_{step:06d}" / "state.safetensors").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("content", ['{"nats', "", "[]", "{}", "\x00"])
def test_a_broken_summary_is_found_and_written_again_by_what_is_advised(run: Path, content: str) -> None:
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (run / "summary.json").write_text(content, encoding="utf-8")
    (fault,) = faults(run)
    assert (fault.subject, str(run / "summary.json") in fault.text) == ("summary", True)
    assert fault.advice == f"restore the file, or remove it; `tiny-onn train --out {run} --resume` then writes it again"
    (run / "summary.json").unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["nats_per_token"] == before["nats_per_token"]
    assert faults(run) == []


def test_a_run_whose_only_checkpoint_is_damaged_begins_anew_as_advised(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_000002")
    damage(run, 4)
    (fault,) = faults(run)
    assert fault.advice == "none is whole: remove the folder checkpoints, and --resume begins anew"
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert faults(run) == []


def test_a_damaged_checkpoint_behind_a_whole_one_is_removed_as_advised(run: Path) -> None:
    damage(run, 4)
    (fault,) = faults(run)
    assert fault.advice == "remove this step's folder to go on from the one before"
    shutil.rmtree(run / "checkpoints" / "step_000004")
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert faults(run) == []
