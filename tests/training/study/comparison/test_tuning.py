"""Tuning: every arm takes its own best values on seeds of their own, in a first phase of the study; edges are named."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.study.test_runner import (
    ARMS,
    STEPS,
    TEXT,
    assert_same_study,
    records,
    rows,
    run_counted_study,
    small_study,
)
from training import run_study
from training.cli import main
from training.errors import UserError
from training.study.analysis import analyse_rows
from training.study.comparison.table import study_table
from training.study.comparison.tuning import choose, points_of, tuning_curves
from training.study.config import Arm, StudyConfig, expand
from training.study.summary import empty_row

AXES = {"hyper.lr": (1e-3, 2e-3, 5e-3), "hyper.router_lr": (1e-3, 4e-3), "hyper.balance_weight": (0.0, 0.01, 0.1)}
FIXED = Arm("hash", {"model.routing": "hash", "hyper.router_lr": 0.0, "hyper.balance_weight": 0.0})


def grid(arms: tuple[Arm, ...] = (Arm("base"), FIXED), **changes: Any) -> StudyConfig:
    values = {"margin": 0.02, "arms": arms, "axes": AXES, "tune": [*AXES], "seeds": (0, 1, 2), "tune_seeds": (7, 8)}
    return StudyConfig("grid", **values | changes)


def scored(study: StudyConfig, score: Any, chosen: Any = None) -> list[dict[str, Any]]:
    return [empty_row(run) | {"nats_per_token": score(run), "status": "finished"} for run in expand(study, chosen)]


def bowl(run: Any) -> float:
    """Lowest at lr 2e-3, router_lr 4e-3, no balance; the arms' minima do not depend on each other's axes."""
    hyper = run.config.hyper
    return 2 + abs(np.log(hyper.lr / 2e-3)) + abs(np.log(max(hyper.router_lr, 1e-9) / 4e-3)) / 9 + hyper.balance_weight


# What is chosen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_point_is_that_of_the_lowest_mean_by_a_loop(seed: int) -> None:
    study = grid(arms=(Arm("base"),))
    scores = {run.id: score for run, score in zip(expand(study), np.random.default_rng(seed).random(36), strict=True)}
    best, lowest = None, 9.0
    for lr, router_lr, balance in product(*AXES.values()):
        mine = [
            scores[run.id]
            for run in expand(study)
            if (run.config.hyper.lr, run.config.hyper.router_lr, run.config.hyper.balance_weight)
            == (lr, router_lr, balance)
        ]
        assert len(mine) == 2, "one run for each seed of the tuning"
        if sum(mine) / 2 < lowest:
            best, lowest = dict(zip(AXES, (lr, router_lr, balance), strict=True)), sum(mine) / 2
    assert choose(points_of(study, scored(study, lambda run: scores[run.id]))) == {"base": best}


def test_a_point_where_a_run_diverged_or_was_no_number_is_not_chosen() -> None:
    study = grid(arms=(Arm("base"),))
    best = {"hyper.lr": 2e-3, "hyper.router_lr": 4e-3, "hyper.balance_weight": 0.0}
    assert choose(points_of(study, scored(study, bowl)))["base"] == best
    for broken in ({"status": "diverged", "nats_per_token": None}, {"nats_per_token": float("nan")}):
        changed = [row | (broken if row["seed"] == 7 and {**row, **best} == row else {}) for row in scored(study, bowl)]
        second = choose(points_of(study, changed))["base"]
        assert second == best | {"hyper.balance_weight": 0.01}


def test_every_arm_has_the_same_grid_but_for_what_it_sets_itself() -> None:
    study = grid()
    runs = expand(study)
    assert sum(run.arm == "base" for run in runs) == 3 * 2 * 3 * 2
    assert [run.config.hyper.lr for run in runs if run.arm == "hash"] == [1e-3, 2e-3, 5e-3] * 2
    assert {(run.config.hyper.router_lr, run.config.hyper.balance_weight) for run in runs if run.arm == "hash"} == {
        (0.0, 0.0)
    }
    analysis = analyse_rows(study, scored(study, bowl))
    assert analysis["arms"]["hash"]["tuned"] == {"hyper.lr": 2e-3}
    assert (analysis["arms"]["base"]["points"], analysis["arms"]["hash"]["points"]) == (18, 3)
    assert [*analysis["arms"]["hash"]["tuning"]] == ["hyper.lr"]
    assert analysis["against_baseline"]["hash"]["baseline"] == "base"


def test_runs_that_are_compared_are_of_other_seeds_at_the_chosen_point_alone() -> None:
    study = grid()
    chosen = choose(points_of(study, scored(study, bowl)))
    runs = expand(study, chosen)
    compared = [run for run in runs if run.seed in study.seeds]
    assert len(runs) - len(compared) == len(expand(study)) == 2 * (18 + 3)
    assert [(run.arm, run.seed) for run in compared] == [(arm, seed) for seed in (0, 1, 2) for arm in ("base", "hash")]
    assert {(run.config.hyper.lr, run.config.hyper.router_lr) for run in compared} == {(2e-3, 4e-3), (2e-3, 0.0)}
    analysis = analyse_rows(study, scored(study, lambda run: bowl(run) + run.seed / 10, chosen))
    assert (analysis["arms"]["base"]["n"], analysis["arms"]["base"]["mean"]) == (3, pytest.approx(2.1))
    before = analyse_rows(study, scored(study, bowl))
    assert (before["arms"]["base"]["n"], before["arms"]["base"]["mean"]) == (0, None), "nothing is compared yet"
    assert before["against_baseline"]["hash"]["verdict"] == "undecided"


# Curves and edges -----------------------------------------------------------------------------------------------------


def test_a_curve_has_the_scores_at_each_value_with_the_other_axes_at_their_best() -> None:
    study = grid()
    analysis = analyse_rows(study, scored(study, lambda run: bowl(run) + (run.seed == 8)))
    curves = analysis["arms"]["base"]["tuning"]
    best = {"hyper.lr": 2e-3, "hyper.router_lr": 4e-3, "hyper.balance_weight": 0.0}
    for key, curve in curves.items():
        assert curve["values"] == [*AXES[key]]
        assert curve["best"] == best[key]
        for value, mean, each in zip(curve["values"], curve["mean"], curve["scores"], strict=True):
            at = best | {key: value}
            mine = [
                bowl(run) + (run.seed == 8)
                for run in expand(study)
                if run.arm == "base" and all(run.overrides[k] == v for k, v in at.items())
            ]
            assert each == pytest.approx(mine)
            assert mean == pytest.approx(sum(mine) / 2)


def test_a_best_value_at_the_end_of_its_axis_is_a_warning_and_one_within_is_none() -> None:
    study = grid()
    analysis = analyse_rows(study, scored(study, bowl))
    curves = analysis["arms"]["base"]["tuning"]
    assert {key: curve["edge"] for key, curve in curves.items()} == {
        "hyper.lr": "", "hyper.router_lr": "largest", "hyper.balance_weight": ""
    }, "nothing is below a weight of 0"  # fmt: skip
    assert analysis["warnings"] == [
        "base: its best hyper.router_lr, 0.004, is the largest that was tried; a larger one may be better, add it to "
        "axes.hyper.router_lr"
    ]
    assert f"warning: {analysis['warnings'][0]}" in study_table(analysis)
    small = analyse_rows(study, scored(study, lambda run: run.config.hyper.lr))
    assert "hash: its best hyper.lr, 0.001, is the smallest that was tried" in "\n".join(small["warnings"])


def test_an_axis_of_words_has_no_edge() -> None:
    study = grid(axes={"surprise_kind": ("w2", "benefit")}, tune=["surprise_kind"])
    analysis = analyse_rows(study, scored(study, lambda run: len(run.config.surprise_kind)))
    assert analysis["arms"]["base"]["tuned"] == {"surprise_kind": "w2"}
    assert analysis["warnings"] == []


def test_axes_that_go_together_have_curves_over_their_pairs() -> None:
    axes = {"hyper.lr": (1e-3, 2e-3, 5e-3), "hyper.router_lr": (1e-3, 2e-3, 4e-3)}
    study = grid(arms=(Arm("base"),), axes=axes, tune=[*axes], combine="zip")
    points = points_of(study, scored(study, bowl))["base"]
    assert [len(curve["values"]) for curve in tuning_curves(points, zipped=True).values()] == [3, 3]


def test_an_axis_that_changes_nothing_in_an_arm_is_named() -> None:
    study = grid()
    analysis = analyse_rows(study, scored(study, lambda run: bowl(run) if run.arm != "base" else run.config.hyper.lr))
    named = [line for line in analysis["warnings"] if "changes no score" in line]
    assert [line.split()[1] for line in named] == ["hyper.router_lr", "hyper.balance_weight"]


# Studies --------------------------------------------------------------------------------------------------------------


def tuned_study(text: str, **changes: Any) -> StudyConfig:
    return small_study(
        text, arms=(ARMS[1], ARMS[2]), baseline="switch",
        axes={"hyper.lr": [1e-3, 5e-3], "hyper.router_lr": [1e-3, 5e-3]},
        tune=["hyper.lr", "hyper.router_lr"], tune_seeds=(5,), **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned study that ran without interruption: eight runs to tune, four to compare, each in groups of three."""
    out = tmp_path_factory.mktemp("studies") / "tuned"
    run_study(tuned_study(text), out, runs_at_once=3)
    return out


def test_a_tuned_study_makes_its_runs_in_two_phases(done: Path, text: str) -> None:
    table, study = rows(done), tuned_study(text)
    assert {row["status"] for row in table} == {"finished"}
    assert [row["seed"] for row in table] == ["5"] * 8 + ["0", "0", "1", "1"]
    analysis = json.loads((done / "analysis.json").read_text(encoding="utf-8"))
    for label, arm in analysis["arms"].items():
        mine = [row for row in table if row["arm"] == label and row["seed"] == "5"]
        best = min(mine, key=lambda row: float(row["nats_per_token"]))
        assert arm["tuned"] == {key: float(best[key]) for key in study.tune}
        compared = [row for row in table if row["arm"] == label and row["seed"] != "5"]
        assert [row["run"] for row in compared] == arm["runs"]
        assert all(float(row[key]) == value for row in compared for key, value in arm["tuned"].items())
    assert analysis["against_baseline"]["surprise"]["effective_speedup"]["n"] == 2
    plan = json.loads((done / "checkpoints" / "compared.json").read_text(encoding="utf-8"))
    assert [len(runs) for runs in plan.values()] == [2, 2]
    assert [*plan] == ["group_003", "group_004"]


def test_a_compared_run_equals_the_same_run_of_a_study_without_tuning(done: Path, text: str, tmp_path: Path) -> None:
    analysis = json.loads((done / "analysis.json").read_text(encoding="utf-8"))
    (run, *_) = analysis["arms"]["surprise"]["runs"]
    alone = small_study(text, arms=(Arm("surprise", analysis["arms"]["surprise"]["tuned"]),), baseline="", seeds=(0,))
    run_study(alone, tmp_path / "alone")
    for mine, theirs in zip(records(done / "runs" / run), records(tmp_path / "alone/runs/surprise-seed0"), strict=True):
        assert mine["main_loss"] == pytest.approx(theirs["main_loss"], rel=1e-5)


@pytest.mark.parametrize("last", [STEPS + 3, 3 * STEPS, 3 * STEPS + 3], ids=["tuning", "between", "compared"])
def test_a_tuned_study_that_is_killed_in_either_phase_and_resumed_has_the_same_bits(
    done: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    out, study = tmp_path / "killed", tuned_study(text)
    with pytest.raises(RuntimeError, match="killed"):
        run_counted_study(monkeypatch, study, out, last, runs_at_once=3)
    left = 5 * STEPS - last + last % STEPS % 2  # checkpoints are those of every second step
    assert run_counted_study(monkeypatch, study, out, 99, resume=True) == left
    assert_same_study(out, done)
    assert not any((out / "checkpoints").glob("group_*"))


def test_a_text_that_changed_between_the_phases_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT, encoding="utf-8")
    study = tuned_study(str(path), seeds=(0,))
    with pytest.raises(RuntimeError, match="killed"):
        run_counted_study(monkeypatch, study, out, STEPS)
    path.write_text(TEXT.replace("least", "LEAST", 1), encoding="utf-8")
    with pytest.raises(UserError, match="got another text"):
        run_study(study, out, resume=True)


def test_a_tuned_study_that_is_done_is_not_repeated(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.study.group.vmapped_step", lambda *_: pytest.fail("trained again"))
    assert main(["study", "--resume", "--out", str(done)]) == 0
    said = capsys.readouterr()
    assert "8 of 4 steps, in 3 vmapped programs to tune, then 4 that are compared" in said.err
    assert "tuned: surprise: lr" in said.err
    assert "warning: " in said.out, "of two values, the best is always at an edge"


def test_orders_of_tasks_are_tuned_as_well(text: str) -> None:
    tasks = {"a": text, "b": text}
    base = replace(small_study(text).base, steps=4)
    study = tuned_study(text, tasks=tasks, orders=(["a", "b"], ["b", "a"]))
    study = replace(study, base=base)
    assert len(expand(study)) == 2 * 4 * 2
    chosen = choose(points_of(study, scored(study, bowl)))
    assert len(expand(study, chosen)) - len(expand(study)) == 2 * 2 * 2


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_a_hash_that_leaves_a_layer_or_the_weights_to_a_router_is_tuned_on_its_rate() -> None:
    for change in ({"model.hash_layers": "0"}, {"model.hash_weights": "router"}):
        study = grid(arms=(Arm("a"), Arm("b", {"model.routing": "hash", **change})))
        assert sum(run.arm == "b" for run in expand(study)) == 18 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "all arms set it": (
            {"arms": (Arm("a", {"hyper.lr": 1e-3}), Arm("b", {"hyper.lr": 2e-3}))},
            "tune: expected axes that some arm is tuned on, got hyper.lr, which all arms set; remove one",
        ),
        "a hash has no router": (
            {"arms": (Arm("a"), Arm("b", {"model.routing": "hash"}))},
            "arms.b: expected tuned axes that matter to it, got hyper.router_lr, which changes nothing where a hash "
            "routes; add `hyper.router_lr: 0.001` to its `set`, which keeps it out of the tuning",
        ),
        "twice": ({"tune": [*AXES, "hyper.lr"]}, "tune: expected each only once, got 'hyper.lr'"),
        "not tuned": (
            {"tune": ["hyper.router_lr"], "arms": (Arm("a", {"hyper.lr": 1e-3}), Arm("b"))},
            "axes.hyper.lr: expected a key that no arm sets, got one of arm 'a'; remove one, or add it to `tune`",
        ),
        "one value": (
            {"axes": {**AXES, "hyper.lr": (1e-3,)}},
            "tune: expected axes of two values or more, hyper.lr among them, got [0.001]; give it more values",
        ),
        "a compared seed": (
            {"tune_seeds": (1, 9)},
            "tune_seeds: expected other seeds than those that are compared (0, 1, 2), got 1; take another",
        ),
        "what an arm cannot have": (
            {"arms": (Arm("a"), Arm("b", {"model.num_experts_per_tok": 99}))},
            "arms.b: model.num_experts_per_tok: expected -1 (dynamic) or 1 to num_experts (16), got 99",
        ),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_badly_tuned_study_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        grid(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
