"""A run whose schedule was laid out anew says so, wherever its score is read, and can be made again."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers import assert_same_bits
from tests.training.run.test_engine import train
from training.cli import main
from training.commands.doctor import examine
from training.run.config import RunConfig
from training.run.schedule import Leg, bends_text, config_at, legs_from, legs_of, reproduction
from training.step.hyper_params import HyperParams
from training.storage.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("own_cache")
FEW = ("--eval-every=0", "--sample-tokens=0", "--picture-every=0", "--checkpoint-every=0")


def test_a_run_with_more_steps_than_it_began_with_has_two_legs_everywhere(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=4", *FEW) == 0
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--steps", "9"]) == 0
    said = capsys.readouterr().err
    assert "note: steps 1 to 4 of a schedule for 4 steps, steps 5 to 9 of one for 9" in said
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["legs"] == [[0, 4], [4, 9]]
    (finding,) = [entry for entry in examine(out) if entry.subject == "schedule"]
    assert "steps 1 to 4 of a schedule for 4 steps" in finding.text
    assert "not the score of a run of 9 steps" in finding.advice
    for step in (3, 7):
        capsys.readouterr()
        assert main(["rerun", str(out), "--step", str(step)]) == 0
        assert capsys.readouterr().out.rstrip().endswith("on record: the same")
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    commands = reproduction([Leg(0, 4), Leg(4, 9)], str(out / "config.yaml"), f"{out}-again").splitlines()
    for command in commands:
        assert command in page
        assert main(shlex.split(command, comments=True)[1:]) == 0
    assert_same_bits(load_checkpoint(f"{out}-again"), load_checkpoint(out))


def test_a_run_that_goes_on_as_it_began_has_one_leg_and_nothing_is_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in {"constant": ("--schedule=constant", "--steps=3"), "same": ("--steps=5",)}.items():
        out = tmp_path / name
        assert train(text, out, *flags, *FEW) == 0
        capsys.readouterr()
        assert main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 0
        assert "note: steps" not in capsys.readouterr().err
        assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["legs"][1:] == []
        assert not [finding for finding in examine(out) if finding.subject == "schedule"]


def test_legs_grow_by_what_changes_and_forget_what_was_never_trained() -> None:
    config = RunConfig(steps=900, hyper=HyperParams(warmup_steps=10))
    assert legs_of(config, None, 0) == (Leg(0, 900),)
    assert legs_of(config, {"legs": [[0, 600]]}, 300) == (Leg(0, 600), Leg(300, 900))
    assert legs_of(config, {"legs": [[0, 600], [300, 900]]}, 400) == (Leg(0, 600), Leg(300, 900))
    assert legs_of(config, {"legs": [[0, 600], [300, 700]]}, 300) == (Leg(0, 600), Leg(300, 900))
    assert legs_of(config, {}, 300) == (Leg(0, 900),), "of a version that did not write them down"
    assert legs_of(config, {"legs": [[0, 600]]}, 10) == (Leg(0, 900),), "the warm-up knows no end"
    assert legs_of(config, {"legs": [[0, 600]]}, 12) == (Leg(0, 600), Leg(12, 900))


def test_a_longer_run_from_the_plateau_of_wsd_is_the_longer_run(text: Path, tmp_path: Path) -> None:
    """What the schedule is for: one run goes on to any length, and only the decay is made anew."""
    flags = ("--schedule=wsd", "--decay-share=0.25", "--hyper.warmup-steps=2", *FEW)
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert train(text, out, "--steps=8", "--checkpoint-every=6", *(flag for flag in flags if flag not in FEW[-1:])) == 0
    shutil.rmtree(out / "checkpoints" / "step_000008")
    assert main(["train", "--out", str(out), "--resume", "--steps", "12"]) == 0
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["legs"] == [[0, 12]]
    assert train(text, whole, "--steps=12", *flags) == 0
    assert_same_bits(load_checkpoint(out), load_checkpoint(whole))


def test_after_its_decay_a_run_of_wsd_that_goes_on_has_two_legs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The negative twin."""
    out = tmp_path / "run"
    assert train(text, out, "--steps=8", "--schedule=wsd", "--decay-share=0.25", *FEW) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "12"]) == 0
    assert "note: steps 1 to 8 of a schedule for 8 steps, steps 9 to 12 of one for 12" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["legs"] == [[0, 8], [8, 12]]


@pytest.mark.parametrize("odd", [None, [], "12", 5, [[1]], [["a", 2]], [[True, 2]]])
def test_odd_legs_of_a_file_are_those_of_the_whole_run(odd: object) -> None:
    assert legs_from(odd, 7) == (Leg(0, 7),)


def test_each_step_has_the_settings_of_its_leg_and_a_leg_cut_short_says_where() -> None:
    legs = (Leg(0, 600), Leg(300, 900))
    config = RunConfig(steps=900)
    assert [config_at(config, legs, step).steps for step in (1, 300, 301, 900)] == [600, 600, 900, 900]
    assert bends_text(legs) == "steps 1 to 300 of a schedule for 600 steps, steps 301 to 900 of one for 900"
    assert reproduction(legs, "c.yaml", "new").splitlines() == [
        "tiny-onn train --config c.yaml --out new --steps 600  # stop it after step 300",
        "tiny-onn train --out new --resume --steps 900",
    ]
    assert reproduction(legs[:1], "c.yaml", "new") == "tiny-onn train --config c.yaml --out new"
