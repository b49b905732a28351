"""A study is its runs: each equals the same run alone, survives kills and its neighbours, and mistakes are named."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from tests.helpers import assert_close
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import flatten
from training import HyperParams, hyper_step, init_state, run_study
from training.cli import main
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import open_corpus
from training.errors import UserError
from training.presets.find import STUDIES
from training.run.config import RunConfig, hyper_params
from training.run.evaluate import evaluate
from training.storage.checkpoint import load_params
from training.storage.recorder import to_record
from training.study.config import Arm, StudyConfig, baselines_of, expand, quick_study, study_values
from training.study.file import load_study, parse_study, save_study
from training.study.plan import check_alike, memory_of_a_run, plan_groups
from training.study.vmapped import split_numbers, vmapped_step

TEXT = "the router sends each token to the expert that it surprises least.\n" * 60
MODEL = ModelConfig(257, 16, 2, 2, 1, 8, 8, 4, num_experts_per_tok=2)
STEPS = 4
ARMS = (
    Arm("frozen", {"hyper.router_lr": 0.0}),
    Arm("surprise"),
    Arm("switch", {"hyper.surprise_weight": 0.0, "hyper.router_coupling": 1.0, "hyper.balance_weight": 0.01}),
    Arm("budget", {"model.num_experts_per_tok": -1, "hyper.explore_prob": 0.1}),
)


def small_study(data: str = "stdlib", **changes: Any) -> StudyConfig:
    base = RunConfig(
        data=data, steps=STEPS, batch_size=2, sequence_length=16, eval_every=2, eval_bytes=100, final_eval_bytes=200,
        checkpoint_every=2, model=MODEL, hyper=HyperParams(lr=5e-3, router_lr=5e-3),
    )  # fmt: skip
    values = {"name": "small", "margin": 0.02, "base": base, "arms": ARMS, "seeds": (0, 1), "baseline": "frozen"}
    return StudyConfig(**values | changes)


@pytest.fixture(scope="module")
def done(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that ran without interruption: a group of six runs and one of two."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    run_study(small_study(text), out)
    return out


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", expand(small_study())[2:5], ids=lambda run: run.id)
def test_a_run_of_a_study_equals_the_same_run_trained_alone(run, done: Path, text: str) -> None:
    config = run.config
    corpus = open_corpus(text, sequence_length=16)
    state, hyper = init_state(config.model, Generator().manual_seed(run.seed)), hyper_params(config)
    for step, record in enumerate(records(done / "runs" / run.id)):
        batch = batch_at(corpus.train, run.seed, step, 2, 16)
        state, metrics = hyper_step(state, batch, hyper, config.model)
        for key, value in to_record(metrics).items():
            np.testing.assert_allclose(record[key], value, rtol=3e-4, atol=1e-5, err_msg=f"{key} of step {step + 1}")
    params, model = load_params(done / "runs" / run.id)
    assert model == config.model
    for name, leaf in flatten(state.params).items():
        assert_close(flatten(params)[name], leaf, 1e-4, name)
    batches = held_out_batches(corpus.held_out, 2, 16, max_bytes=200)
    score = evaluate(
        state.params, config.model, batches, scored_span(corpus.held_out, 200).num_bytes, surprise_budget=0.5
    )
    row = next(row for row in rows(done) if row["run"] == run.id)
    assert float(row["nats_per_token"]) == pytest.approx(score.nats_per_token, rel=1e-5)


def test_every_run_leaves_what_the_report_reads(done: Path) -> None:
    table = rows(done)
    assert [row["run"] for row in table] == [run.id for run in expand(small_study())]
    assert {row["status"] for row in table} == {"finished"}
    assert table[0]["hyper.router_lr"] == "0.0"
    assert table[1]["hyper.router_lr"] == "0.005"
    for row in table:
        assert all(row[key] for key in ("nats_per_token", "bits_per_byte", "avg_k", "max_vio", "active_parameters"))
        history = records(done / "runs" / row["run"])
        assert [record["step"] for record in history] == [1, 2, 3, 4]
        assert [record["step"] for record in history if "held_out_nats" in record] == [2, 4]
        summary = json.loads((done / "runs" / row["run"] / "summary.json").read_text(encoding="utf-8"))
        assert (summary["status"], summary["steps"]) == ("finished", STEPS)
        met = history[-1]["co_activation_layers"]
        assert summary["routing"]["co_activation"] == pytest.approx(sum(met) / len(met), rel=1e-3)
        assert float(row["flops_per_token"]) > float(row["active_parameters"])
    assert not any((done / "checkpoints").glob("group_*"))
    analysis = json.loads((done / "analysis.json").read_text(encoding="utf-8"))
    assert analysis["arms"].keys() == {arm.name for arm in ARMS}
    assert analysis["against_baseline"].keys() == {"surprise", "switch", "budget"}


def test_runs_of_one_seed_see_the_same_text_and_others_another(done: Path) -> None:
    first = {run.id: records(done / "runs" / run.id)[0]["main_loss"] for run in expand(small_study())}
    assert first["surprise-seed0"] == pytest.approx(first["frozen-seed0"], rel=1e-5)
    assert first["surprise-seed0"] != pytest.approx(first["surprise-seed1"], rel=1e-5)


def test_a_diverging_run_is_reported_and_its_neighbours_are_as_without_it(text: str, tmp_path: Path) -> None:
    arms = (Arm("calm"), Arm("wild", {"hyper.lr": 1e30, "hyper.max_grad_norm": 1e30}), Arm("slow", {"hyper.lr": 1e-4}))
    tame = (arms[0], Arm("wild", {"hyper.lr": 1e-3, "hyper.max_grad_norm": 2.0}), arms[2])
    for name, study_arms in (("wild", arms), ("tame", tame)):
        study = small_study(text, arms=study_arms, baseline="calm", seeds=(0,))
        base = replace(study.base, steps=3, eval_every=0, model=replace(MODEL, num_hidden_layers=1))
        run_study(replace(study, base=base), tmp_path / name)
    wild, other = (rows(tmp_path / name) for name in ("wild", "tame"))
    assert [row["status"] for row in wild] == ["finished", "diverged", "finished"]
    assert wild[1]["nats_per_token"] == ""
    assert (wild[0], wild[2]) == (other[0], other[2])
    for arm in ("calm", "slow"):
        mine, theirs = (records(tmp_path / name / "runs" / f"{arm}-seed0") for name in ("wild", "tame"))
        assert mine == theirs
    last = records(tmp_path / "wild" / "runs" / "wild-seed0")[-1]
    assert last["grad_norm"] is None, "the gradient goes before the loss does"
    analysis = json.loads((tmp_path / "wild" / "analysis.json").read_text(encoding="utf-8"))
    assert analysis["arms"]["wild"] | {"mean": None, "n": 0, "diverged": 1} == analysis["arms"]["wild"]
    assert analysis["against_baseline"]["wild"]["verdict"] == "undecided"


def test_a_study_that_is_killed_twice_and_resumed_has_the_same_bits(
    done: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashes, not Ctrl-C: no checkpoint is written on the way out. Checkpoints are those of every second step."""
    out = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        run_counted(monkeypatch, text, out, last=3)  # in step 4 of the first group
    assert {row["status"] for row in rows(out)} == {"unfinished"}
    with pytest.raises(RuntimeError, match="killed"):
        run_counted(monkeypatch, text, out, last=3, resume=True)  # steps 3 and 4, then in step 2 of the second group
    assert [row["status"] for row in rows(out)].count("finished") == 6
    assert run_counted(monkeypatch, text, out, resume=True) == STEPS
    assert_same_study(out, done)


def run_counted(
    patch: pytest.MonkeyPatch, text: str, out: Path, last: int = 99, error: type = RuntimeError, **how: Any
) -> int:
    """Run the study until `last` steps are made, then raise; how many were made."""
    return run_counted_study(patch, small_study(text), out, last, error, **how)


def run_counted_study(
    patch: pytest.MonkeyPatch, study: StudyConfig, out: Path, last: int = 0, error: type = RuntimeError, **how: Any
) -> int:
    calls = []

    def counted(*of):
        step = vmapped_step(*of)

        def stepped(*args):
            if len(calls) == last:
                raise error("killed")
            calls.append(1)
            return step(*args)

        return stepped

    patch.setattr("training.study.group.vmapped_step", counted)
    run_study(study, out, **how)
    return len(calls)


def assert_same_study(mine: Path, theirs: Path) -> None:
    assert rows(mine) == rows(theirs)
    for run in rows(theirs):
        assert records(mine / "runs" / run["run"]) == records(theirs / "runs" / run["run"])
        ours, other = (flatten(load_params(folder / "runs" / run["run"])[0]) for folder in (mine, theirs))
        assert all(torch.equal(ours[name], leaf) for name, leaf in other.items())


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_counted(monkeypatch, text, out, last=1, error=KeyboardInterrupt)
    assert f"tiny-onn study --resume --out {out}" in capsys.readouterr().err
    assert (out / "checkpoints" / "group_000" / "checkpoints" / "step_000001").is_dir()


@pytest.mark.parametrize("finished", [0, 1])
def test_a_text_that_changed_is_noticed_before_any_group_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: int
) -> None:
    """No group has begun, or one is finished and the other has not begun: no checkpoint remembers the text."""
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT, encoding="utf-8")
    study = small_study(str(path), arms=(ARMS[0], ARMS[3]), seeds=(0,))
    groups: list[int] = []

    def interrupted(*of: Any) -> Any:
        groups.append(1)
        if len(groups) > finished:
            raise RuntimeError("killed")
        return vmapped_step(*of)

    with monkeypatch.context() as patch:
        patch.setattr("training.study.group.vmapped_step", interrupted)
        with pytest.raises(RuntimeError, match="killed"):
            run_study(study, out)
    assert not [*out.glob("checkpoints/group_*/checkpoints/step_*")]
    path.write_text(TEXT.replace("least", "LEAST", 1), encoding="utf-8")
    assert main(["study", "--resume", "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"expected the settings and the text that {out} began with, got another text" in said
    path.write_text(TEXT, encoding="utf-8")
    assert main(["study", "--resume", "--out", str(out)]) == 0


def test_a_finished_study_is_not_repeated(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.study.group.vmapped_step", lambda *_: pytest.fail("trained again"))
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    assert main(["study", "--resume", "--out", str(copy)]) == 0
    assert_same_study(copy, done)
    printed = capsys.readouterr().out
    assert all(arm.name in printed for arm in ARMS)


# Groups ---------------------------------------------------------------------------------------------------------------


def test_groups_mix_no_static_settings_and_hold_every_run_once() -> None:
    runs = expand(small_study(seeds=range(5)))
    groups = plan_groups(runs, 4)
    assert sorted(run.id for group in groups for run in group.runs) == sorted(run.id for run in runs)
    assert [len(group.runs) for group in groups] == [4, 4, 4, 3, 3, 2]
    for group in groups:
        assert len({(run.config.model, run.config.steps) for run in group.runs}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": replace(MODEL, num_experts=8)},
            "model.num_experts: expected one value in a vmapped group, got 4 and 8",
        ),
        ({"batch_size": 3}, "batch_size: expected one value in a vmapped group, got 2 and 3"),
        ({"surprise_kind": "benefit"}, "surprise_kind: expected one value in a vmapped group, got 'w2' and 'benefit'"),
    ],
)
def test_a_static_key_mixed_into_a_vmapped_group_is_named_with_the_mend(changes: dict[str, Any], message: str) -> None:
    base = small_study().base
    with pytest.raises(UserError, match=message) as error:
        vmapped_step([base, replace(base, seed=1, hyper=base.hyper._replace(lr=1e-2)), replace(base, **changes)])
    assert "plan_groups" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_that_mixes_groups_is_refused_before_a_step(text: str, tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    study = small_study(text, arms=(ARMS[0], ARMS[3]), seeds=(0,))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        run_counted_study(patch, study, out)
    plan = out / "checkpoints" / "plan.json"
    runs = [run for group in json.loads(plan.read_text(encoding="utf-8")).values() for run in group]
    plan.write_text(json.dumps({"group_000": runs}), encoding="utf-8")
    shutil.rmtree(out / "checkpoints" / "group_000", ignore_errors=True)
    with pytest.raises(
        UserError, match=r"plan\.json: model\.num_experts_per_tok: expected one value in a vmapped group"
    ):
        run_study(study, out, resume=True)


def test_as_many_runs_at_once_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = expand(small_study(arms=(), baseline="", seeds=range(20)))
    need = memory_of_a_run(runs[0].config)
    for free, wanted in ((0, 1), (2 * 5 * need, 5), (2**60, 20)):
        monkeypatch.setattr("training.study.plan.available_memory", lambda free=free: free)
        assert max(len(group.runs) for group in plan_groups(runs)) == wanted
    large = [run._replace(config=replace(run.config, batch_size=4096)) for run in runs]
    assert max(len(group.runs) for group in plan_groups(large)) < 5, "a large step has no overhead to share"


def test_numbers_that_agree_stay_python_numbers_and_others_are_mapped() -> None:
    hypers = [hyper_params(run.config) for run in expand(small_study(seeds=(0,)))][:3]
    numbers, varied = split_numbers(hypers)
    assert varied.keys() == {"router_lr", "surprise_weight", "router_coupling", "balance_weight"}
    assert varied["router_lr"].tolist() == [0.0, 5e-3, 5e-3]
    assert numbers.explore_prob == 0
    assert all(isinstance(number, int | float) for number in numbers)


# Expansion ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_and_a_zip_is_pairs() -> None:
    axes = {"hyper.lr": [1e-3, 3e-3], "model.hidden_size": [16, 32]}
    grid = expand(small_study(arms=(), baseline="", axes=axes))
    assert len(grid) == 2 * 4
    assert grid[1].arm == "lr=0.001 hidden_size=32"
    assert (grid[1].config.hyper.lr, grid[1].config.model.hidden_size, grid[1].config.seed) == (1e-3, 32, 0)
    pairs = expand(small_study(arms=(), baseline="", axes=axes, combine="zip", seeds=(3,)))
    assert [(run.config.hyper.lr, run.config.model.hidden_size) for run in pairs] == [(1e-3, 16), (3e-3, 32)]
    assert pairs[0].overrides == {"hyper.lr": 1e-3, "model.hidden_size": 16}
    assert pairs[0].id == "lr=0.001-hidden_size=16-seed3"


def test_arms_are_compared_at_the_same_point_and_tuned_axes_are_no_arms() -> None:
    crossed = small_study(arms=ARMS[:2], axes={"data": ["a.txt", "b.txt"]})
    assert baselines_of(crossed)["surprise data=b.txt"] == "frozen data=b.txt"
    tuned = small_study(arms=ARMS[:2], axes={"hyper.lr": [1e-3, 2e-3]}, tune=["hyper.lr"])
    assert {run.arm for run in expand(tuned)} == {"frozen", "surprise"}
    assert len({run.id for run in expand(tuned)}) == 8


def test_runs_of_the_tuning_are_of_the_same_program_as_those_that_are_compared() -> None:
    study = small_study(arms=ARMS[:2], axes={"hyper.lr": [1e-3, 2e-3]}, tune=["hyper.lr"], tune_seeds=[5, 6])
    (tuning,) = plan_groups(expand(study))
    assert len({run.id for run in tuning.runs}) == 2 * 2 * 2
    assert [run.seed for run in tuning.runs[::4]] == [5, 6]
    chosen = {"frozen": {"hyper.lr": 1e-3}, "surprise": {"hyper.lr": 2e-3}}
    compared = expand(study, chosen)[len(tuning.runs) :]
    assert [(run.arm, run.config.hyper.lr, run.seed) for run in compared] == [
        ("frozen", 1e-3, 0), ("surprise", 2e-3, 0), ("frozen", 1e-3, 1), ("surprise", 2e-3, 1)
    ]  # fmt: skip
    check_alike([run.config for run in (*tuning.runs, *compared)])
    quick = replace(study, quick={"seeds": [0], "tune_seeds": [1]})
    assert {run.seed for run in expand(quick_study(quick))} == {1}


def test_a_study_survives_its_own_yaml(tmp_path: Path) -> None:
    axes, quick = {"hyper.lr": [1e-3, 2e-3]}, {"steps": 2, "seeds": [0], "tune_seeds": [3]}
    study = small_study(axes=axes, tune=["hyper.lr"], tune_seeds=(3, 4), quick=quick)
    save_study(study, tmp_path / "study.yaml")
    again = load_study(tmp_path / "study.yaml")
    assert study_values(again) == study_values(study)
    assert expand(again) == expand(study)


def test_the_quick_version_changes_base_seeds_and_arms() -> None:
    study = small_study(quick={"steps": 2, "hyper.lr": 1e-4, "seeds": [7], "arms": ["frozen", "switch"]})
    quick = expand(quick_study(study))
    assert [run.id for run in quick] == ["frozen-seed7", "switch-seed7"]
    assert {(run.config.steps, run.config.hyper.lr) for run in quick} == {(2, 1e-4)}
    crossed = small_study(axes={"hyper.lr": [1e-3, 2e-3]}, quick={"axes": {"hyper.lr": [1e-3]}})
    assert len(expand(quick_study(crossed))) == len(expand(crossed)) // 2
    assert {run.arm for run in expand(quick_study(crossed))} == {arm.name for arm in ARMS}  # one value needs no name


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_study_says_in_advance_what_would_settle_it(path: Path) -> None:
    study, quick = load_study(path), load_study(path, quick=True)
    assert study.question.endswith("?")
    assert study.falsifier.endswith(".")
    assert len(study.seeds) >= 5
    assert study.baseline in {arm.name for arm in study.arms}
    assert len(expand(quick)) < len(expand(study))
    assert {run.config.data for run in expand(quick)} == {"stdlib"}  # always there


MISTAKES = {
    "axs: {}": "axs: unknown key, did you mean axes?",
    "margin: 0": "margin: expected more than 0",
    "margin: null": "margin: expected nats per token, got none",
    "seeds: []": "seeds: expected at least one seed",
    "seeds: [1, 1]": "seeds: expected each only once, got 1",
    "seeds: [true]": "seeds[1]: expected a whole number, got True",
    "seeds: 3": "seeds: expected a list, got 3",
    "axes: {hyper.lrr: [1]}": "axes.hyper.lrr: unknown key, did you mean hyper.lr?",
    "axes: {hyper.lr: []}": "axes.hyper.lr: expected at least one value",
    "axes: {hyper.lr: 1e-3}": "axes.hyper.lr: expected a list, got 0.001; write it as [a, b]",
    "axes: {hyper.lr: }": "axes.hyper.lr: expected a list, got None; write it as [a, b]",
    "axes: {hyper.lr: [fast]}": "axes.hyper.lr: expected a number, got 'fast'",
    "axes: {hyper.lr: [-1]}": "axes: hyper.lr: expected 0 or more, got -1",
    "axes: {hyper.lr: [1e-3, 1e-3]}": "axes.hyper.lr: expected each only once",
    "axes: {seed: [1, 2]}": "axes.seed: expected a setting of a run in a study, got seed; give `seeds:",
    "axes: {hyper.lr: [1e-3], steps: [1, 2]}\ncombine: zip": "axes: expected as many values on each",
    "combine: both": "combine: expected one of grid, zip, got 'both'",
    "arms: [{name: a}, {name: a, set: {steps: 3}}]": "arms: expected each only once, got 'a'",
    "arms: [{name: a}, {name: b}]": "arms: expected arms that differ, got the same run for 'a' and 'b'",
    f"arms: [{{name: a}}, {{name: b, set: {{steps: {RunConfig().steps}}}}}]": "expected arms that differ",
    "arms: [{set: {steps: 3}}]": "arms[1].name: expected text, got none",
    "arms: [{name: a, sett: {steps: 3}}]": "arms[1].sett: unknown key",
    "arms: [{name: a, set: {model.hiden_size: 3}}]": "arms.a.set.model.hiden_size: unknown key, did you mean",
    "arms: [{name: a, set: {model: {num_experts: 0}}}]": "arms.a: model.num_experts: expected 1 or more, got 0",
    "arms: [{name: a, set: {hyper.lr: 1}}]\naxes: {hyper.lr: [2]}": "axes.hyper.lr: expected a key that no arm sets",
    "arms: [{name: a}, {name: b, set: {steps: 3}}]\nbaseline: c": "baseline: expected an arm (a, b), got 'c'",
    "arms: [{name: a b}, {name: a/b, set: {steps: 3}}]": "expected names that differ in letters",
    "tune_seeds: [5]": "tune_seeds: expected none without tune, got [5]; add `tune: [AXIS]`, or remove them",
    "axes: {hyper.lr: [1]}\ntune: [hyper.lr]": "tune: expected axes of two values or more, hyper.lr among them, got [1",
    "axes: {hyper.lr: [1, 2]}\ntune: [hyper.lr]\ntune_seeds: [1, 5]": (
        "tune_seeds: expected other seeds than those that are compared (0, 1), got 1; take another"
    ),
    "axes: {hyper.lr: [1, 2]}\ntune: [hyper.lr]\ntune_seeds: [5, 5]": "tune_seeds: expected each only once, got 5",
    "axes: {hyper.lr: [1, 2]}\ntune: [hyper.lr]\ntune_seeds: [a]": "tune_seeds[1]: expected a whole number, got 'a'",
    "axes: {hyper.lr: [1, 2]}\ntune: [hyper.lr]\ntune_seeds: 5": "tune_seeds: expected a list, got 5",
    "quick: {tune_seeds: [a]}": "quick.tune_seeds[1]: expected a whole number, got 'a'",
    "tune: [hyper.lr]": "tune: expected axes (there are none), got 'hyper.lr'",
    "base: {hyper: {lr: no}}": "base.hyper.lr: expected a number, got 'no'",
    "base: {stepz: 3}": "base.stepz: unknown key, did you mean steps?",
    "base: {shard_optimizer: true}": "base.shard_optimizer: expected False in a study, got True; torchrun",
    "base: {shard_experts: 2}": "base.shard_experts: expected 1 in a study, got 2; torchrun reads it",
    "axes: {shard_experts: [1, 2]}": "axes.shard_experts: expected a setting of a run in a study, got shard_experts",
    "base: {compile: true}": "base.compile: expected False in a study, got True; a study's runs share programs",
    "base: {surprise_kind: bananas}": "base.surprise_kind: expected one of w2, unweighted, experts, input, benefit",
    "arms: [{name: a, set: {surprise_kind: bananas}}]": "arms.a.set.surprise_kind: expected one of w2, unweighted",
    "axes: {surprise_kind: [w2, bananas]}": "axes.surprise_kind: expected one of w2, unweighted, experts",
    "quick: {surprise_kind: bananas}": "quick.surprise_kind: expected one of w2, unweighted, experts",
    "base: 3": "base: expected keys and values below it, got 3",
    "quick: {stepz: 3}": "quick.stepz: unknown key",
    "quick: {axes: {hyper.lr: 1}}": "quick.axes.hyper.lr: expected a list, got 1",
    "record_every: 0": "record_every: expected 1 or more",
}


@pytest.mark.parametrize(("lines", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_bad_study_gets_one_line_that_names_the_file_and_the_key(
    lines: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [line.partition(":")[0] for line in lines.splitlines()]
    fine = [line for line in ("margin: 0.02", "seeds: [0, 1]") if line.partition(":")[0] not in keys]
    path = tmp_path / "bad.yaml"
    path.write_text("\n".join([*fine, lines]), encoding="utf-8")
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tiny-onn: {path}: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_flags_and_files_that_do_not_fit_are_refused(
    done: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    save_study(small_study(text), path)
    other = tmp_path / "other.yaml"
    save_study(small_study(text, margin=0.5), other)
    (tmp_path / "empty").mkdir()
    for flags, message in {
        (str(path), "--out", str(done)): "which holds a study; add --resume",
        (str(other), "--out", str(done), "--resume"): "got another one",
        (
            str(path),
            "--out",
            str(done),
            "--resume",
            "--runs-at-once",
            "2",
        ): "--runs-at-once: expected none with --resume",
        (str(path), "--out", str(tmp_path / "empty"), "--resume"): "found none; leave --resume away",
        (str(path), "--out", str(path)): "got the file",
        (str(path), "--out", str(tmp_path / "new"), "--runs-at-once", "0"): "--runs-at-once: expected 1 or more, got 0",
        (str(path), "--quick", "--out", str(tmp_path / "new")): "quick: expected what the short version changes",
        (): "FILE.yaml: expected the file of a study, got none",
        ("--resume", "--quick", "--out", str(done)): "--quick: expected a FILE.yaml",
        (str(tmp_path / "none.yaml"),): "expected a YAML file",
    }.items():
        assert main(["study", *flags]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_mistake_in_python_is_a_user_error() -> None:
    with pytest.raises(UserError, match="seeds: expected at least one seed"):
        StudyConfig("none", margin=0.1)
    with pytest.raises(UserError, match=r"arms\.a\.set\.hyper\.speed: unknown key"):
        small_study(arms=(Arm("a", {"hyper.speed": 1}),), baseline="")
    with pytest.raises(UserError, match="unknown key"):
        parse_study({"nam": 1}, name="x")
