"""A study file that is wrong is answered with the shape that is wanted; the one in docs/studies.md works."""

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT
from training.cli import QUICK, main
from training.errors import UserError
from training.storage.plain_yaml import read_yaml
from training.study.config import StudyConfig
from training.study.file import SHAPES, load_study, parse_study

EXAMPLE = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.mark.parametrize("key", [key for key in SHAPES if key != "margin"])
def test_a_key_of_another_kind_is_answered_with_how_it_is_written(key: str) -> None:
    values = {"margin": 0.1, "seeds": [0], key: 3}
    with pytest.raises(UserError, match=rf"^{key}: expected .*, got .*; write `{key}: ") as error:
        parse_study(values, name="x")
    assert SHAPES[key] in str(error.value)


@pytest.mark.parametrize("arm", [["frozen"], "frozen", {"name": "frozen", "hyper.lr": 1}])
def test_an_arm_of_another_shape_is_answered_with_the_shape_of_arms(arm: object) -> None:
    with pytest.raises(UserError, match=r"^arms\[1\].*; write `arms: \[\{name: low, set: \{hyper.lr: 0.001\}\}"):
        parse_study({"margin": 0.1, "seeds": [0], "arms": [arm]}, name="x")


def test_the_shapes_that_are_shown_are_those_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("\n".join(SHAPES.values()), encoding="utf-8")
    study = parse_study(read_yaml(str(tmp_path / "whole.yaml")), name="x")
    assert isinstance(study, StudyConfig)
    assert [arm.name for arm in study.arms] == ["low", "high"]


def test_the_study_file_of_the_documentation_runs_and_a_quick_one_says_that_it_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    file, out = tmp_path / "rates.yaml", tmp_path / "study"
    small = EXAMPLE.replace("hyper: {lr: 0.005}", "hyper: {lr: 0.005}\n  batch_size: 2\n  final_eval_bytes: 200")
    small = small.replace("quick: {steps: 20,", "quick: {steps: 2,")
    assert len(EXAMPLE.splitlines()) <= 15
    file.write_text(EXAMPLE, encoding="utf-8")
    assert len(load_study(file).arms) == 2
    file.write_text(small, encoding="utf-8")
    assert main(["study", str(file), "--out", str(out), "--quick"]) == 0
    said = capsys.readouterr()
    assert f"note: {QUICK}\n" in said.err
    assert f"\n{QUICK}\n" in said.out
    for line in (
        "study       rates: Does a frozen router lose at a learning rate that suits both?",
        "arms        2: learned, frozen",
        "runs        4 of 2 steps, in 1 vmapped program",
        "data        stdlib:json/*.py",
        f"folder      {out}",
    ):
        assert line in said.err.splitlines()
    assert main(["study", str(file), "--out", str(tmp_path / "quiet"), "--quick", "-q"]) == 0
    assert capsys.readouterr().err == ""
