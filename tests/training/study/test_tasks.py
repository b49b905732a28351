"""A stream of tasks: its batches, its matrix of scores and what that says, exact resume, and mistakes in one line."""

import csv
import json
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
from training.data.sources import find_source
from training.errors import UserError
from training.report.html.wording import bounds
from training.run.config import RunConfig, hyper_params
from training.run.engine import train
from training.run.evaluate import evaluate
from training.storage.checkpoint import load_params
from training.study.config import Arm, StudyConfig, expand, study_values
from training.study.file import load_study, save_study
from training.study.plan import plan_groups
from training.study.tasks import batches_at, continual_measures, row_tasks, task_at, task_that_ends
from training.study.vmapped import vmapped_step

MODEL = ModelConfig(257, 16, 1, 2, 1, 8, 8, 4, num_experts_per_tok=2)
ARMS = (Arm("plain"), Arm("replay", {"replay": 0.5}))
ORDERS = (("letters", "digits"), ("digits", "letters"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tasks without a byte in common, so that a row tells its task."""
    home = tmp_path_factory.mktemp("texts")
    contents = {"letters": "router sends tokens to experts; " * 60, "digits": "2718281828459045.31415926535897 " * 60}
    for name, text in contents.items():
        (home / f"{name}.txt").write_text(text.replace(" ", "" if name == "letters" else "0"), encoding="utf-8")
    return {name: str(home / f"{name}.txt") for name in contents}


def stream_study(texts: dict[str, str], **changes: Any) -> StudyConfig:
    base = RunConfig(
        steps=4, batch_size=4, sequence_length=16, schedule="constant", eval_every=0, final_eval_bytes=100,
        checkpoint_every=3, model=MODEL, hyper=HyperParams(lr=5e-3, router_lr=5e-3),
    )  # fmt: skip
    values = {"name": "stream", "margin": 0.02, "base": base, "arms": ARMS, "seeds": (0, 1), "baseline": "plain"}
    return StudyConfig(**values | {"tasks": texts, "orders": ORDERS, "analysis_tokens": 0} | changes)


@pytest.fixture(scope="module")
def done(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stream's study that ran without interruption, all eight runs in one program."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    run_study(stream_study(texts), out)
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def summary(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / run / "summary.json").read_text(encoding="utf-8"))


# The matrix -----------------------------------------------------------------------------------------------------------


def test_measures_of_a_matrix_are_those_by_hand() -> None:
    matrix = [[1.0, 5.0, 9.0], [1.5, 2.0, 8.0], [3.0, 2.5, 4.0]]
    measures = continual_measures(matrix)
    assert measures.bwt == pytest.approx(((1 - 3) + (2 - 2.5)) / 2)
    assert measures.forgetting == pytest.approx(((3 - 1) + (2.5 - 2)) / 2)
    assert measures.plasticity == pytest.approx((1 + 2 + 4) / 3)


def test_a_later_task_that_helps_is_positive_transfer_and_forgetting_counts_from_the_best() -> None:
    matrix = [[3.0, 3.0, 3.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0]]  # the first task is best after the second one
    measures = continual_measures(matrix)
    assert measures.bwt == pytest.approx(((3 - 2) + 0) / 2)
    assert measures.forgetting == pytest.approx(((2 - 1) + 0) / 2)
    kept = continual_measures([[1.0, 4.0], [1.0, 2.0]])
    assert (kept.bwt, kept.forgetting) == (0.0, 0.0)


# The stream -----------------------------------------------------------------------------------------------------------


def test_every_task_has_the_same_number_of_steps_one_after_the_other() -> None:
    assert [task_at(step, 12, 4) for step in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    ends = {steps: task_that_ends(steps, 12, 4) for steps in range(13)}
    assert {steps: task for steps, task in ends.items() if task is not None} == {3: 0, 6: 1, 9: 2, 12: 3}
    assert [task_at(step, 5, 1) for step in range(5)] == [0] * 5
    assert task_that_ends(5, 5, 1) == 0


def test_rows_come_from_the_task_of_the_step_and_replayed_ones_from_earlier_tasks(texts: dict[str, str]) -> None:
    corpora = {name: open_corpus(data, sequence_length=16) for name, data in texts.items()}
    runs = expand(stream_study(texts, seeds=(3,)))
    kinds = {}
    for step in range(4):
        batch = batches_at(corpora, runs, step)
        assert batch.input_ids.shape == (len(runs), 4, 16)
        for run, ids, labels in zip(runs, batch.input_ids, batch.labels, strict=True):
            digits = ((ids >= ord("0")) & (ids <= ord("9")) | (ids == ord("."))).all(dim=1)
            following = ((labels >= ord("0")) & (labels <= ord("9")) | (labels == ord("."))).all(dim=1)
            assert torch.equal(digits, following)  # ids and labels of a row are of one task
            kinds.setdefault((run.arm, run.order[0]), []).append(digits.tolist())
    no, yes = [False] * 4, [True] * 4
    assert kinds["plain", "letters"] == [no, no, yes, yes]
    assert kinds["plain", "digits"] == [yes, yes, no, no]
    assert kinds["replay", "letters"] == [no, no, [True, True, False, False], [True, True, False, False]]
    again = batches_at(corpora, runs[-1:], 3)
    assert all(torch.equal(alone[0], many[-1]) for alone, many in zip(again, batches_at(corpora, runs, 3), strict=True))
    rest = batch_at(corpora["letters"].train, 3, 3, 4, 16)
    assert torch.equal(again.input_ids[0, :2], rest.input_ids[:2])  # what is not replayed is as without replay


@pytest.mark.parametrize(("rows", "replay"), [(8, 0.5), (3, 0.25)])
def test_the_replayed_share_is_the_wanted_one_and_all_earlier_tasks_are_equally_likely(
    rows: int, replay: float
) -> None:
    drawn = np.stack([row_tasks(3, 7, step, rows, replay) for step in range(500)])
    counts = (drawn < 3).sum(axis=1)
    assert counts.mean() == pytest.approx(rows * replay, abs=0.06)
    assert set(counts.tolist()) <= {int(rows * replay), -int(-rows * replay // 1)}
    shares = np.bincount(drawn[drawn < 3], minlength=3) / counts.sum()
    assert shares == pytest.approx([1 / 3] * 3, abs=0.08)


def test_replay_is_a_function_of_seed_and_step_and_begins_with_the_second_task() -> None:
    first = [row_tasks(3, 1, step, 8, 0.5).tolist() for step in range(20)]
    assert first[::-1] == [row_tasks(3, 1, step, 8, 0.5).tolist() for step in reversed(range(20))]
    assert first != [row_tasks(3, 2, step, 8, 0.5).tolist() for step in range(20)]
    assert len({tuple(row) for row in first}) > 5
    assert row_tasks(0, 1, 5, 8, 0.5).tolist() == [0] * 8
    assert row_tasks(2, 1, 5, 8, 0.0).tolist() == [2] * 8


# Runs -----------------------------------------------------------------------------------------------------------------


def test_orders_and_replay_train_in_one_program_and_pairs_share_seed_and_order(texts: dict[str, str]) -> None:
    runs = expand(stream_study(texts))
    assert len(runs) == 2 * 2 * 2
    assert len(plan_groups(runs, 16)) == 1
    assert runs[3].id == "replay-order2-seed0"
    assert runs[3].order == ORDERS[1]
    assert {run.arm for run in runs} == {arm.name for arm in ARMS}  # an order is no arm


@pytest.mark.parametrize("index", [1, 6])
def test_a_run_of_a_stream_equals_the_same_run_trained_alone(index: int, done: Path, texts: dict[str, str]) -> None:
    run = expand(stream_study(texts))[index]
    config, corpora = run.config, {name: open_corpus(data, sequence_length=16) for name, data in texts.items()}
    state, matrix = init_state(MODEL, Generator().manual_seed(run.seed)), []
    for step in range(4):
        batch = batch_at(corpora[run.order[step // 2]].train, run.seed, step, 4, 16)
        if step >= 2 and config.replay:
            earlier = batch_at(corpora[run.order[0]].train, run.seed, step, 4, 16)
            batch = type(batch)(*(torch.cat([new[:2], old[2:]]) for new, old in zip(batch, earlier, strict=True)))
        state, _ = hyper_step(state, batch, hyper_params(config), MODEL)
        if step % 2:
            matrix.append([_score(state.params, corpora[task].held_out) for task in run.order])
    result = summary(done, run.id)
    np.testing.assert_allclose(result["score_matrix"], matrix, rtol=1e-4)
    for name, leaf in flatten(state.params).items():
        assert_close(flatten(load_params(done / "runs" / run.id)[0])[name], leaf, 1e-4, name)
    row = next(row for row in rows(done) if row["run"] == run.id)
    assert row["order"] == " > ".join(run.order)
    assert float(row["nats_per_token"]) == pytest.approx(sum(matrix[-1]) / 2, rel=1e-4)
    for key, value in continual_measures(matrix)._asdict().items():
        assert float(row[key]) == pytest.approx(value, abs=1e-3)


def _score(params: Any, corpus: Any) -> float:
    batches = held_out_batches(corpus, 4, 16, max_bytes=100)
    return evaluate(params, MODEL, batches, scored_span(corpus, 100).num_bytes, surprise_budget=0.5).nats_per_token


def test_a_stream_that_is_stopped_behind_a_task_and_resumed_has_the_same_bits(
    done: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "killed", []

    def counted(*of):
        step = vmapped_step(*of)

        def stepped(*args):
            if len(calls) == 3:  # one task is scored
                raise KeyboardInterrupt
            calls.append(1)
            return step(*args)

        return stepped

    with monkeypatch.context() as patch:
        patch.setattr("training.study.group.vmapped_step", counted)
        with pytest.raises(KeyboardInterrupt):
            run_study(stream_study(texts), out)
    run_study(stream_study(texts), out, resume=True)
    assert rows(out) == rows(done)
    for row in rows(done):
        assert summary(out, row["run"])["score_matrix"] == summary(done, row["run"])["score_matrix"]
        mine, theirs = (flatten(load_params(folder / "runs" / row["run"])[0]) for folder in (out, done))
        assert all(torch.equal(mine[name], leaf) for name, leaf in theirs.items())


def test_the_analysis_pairs_seeds_with_all_orders(done: Path) -> None:
    analysis = json.loads((done / "analysis.json").read_text(encoding="utf-8"))
    assert analysis["arms"]["plain"]["n"] == 4
    pair = analysis["against_baseline"]["replay"]
    assert (pair["n"], pair["orders"]) == (2, 2)
    table = {(row["arm"], row["seed"], row["order"]): row for row in rows(done)}
    for measure, difference in (("nats_per_token", pair), ("bwt", analysis["continual"]["replay"]["bwt"])):
        each = [
            float(row[measure]) - float(table["plain", seed, order][measure])
            for (arm, seed, order), row in table.items()
            if arm == "replay"
        ]
        assert difference["difference"] == pytest.approx(sum(each) / 4)
    assert analysis["continual"]["plain"]["forgetting"]["difference"] is None
    mean = sum(float(row["bwt"]) for row in rows(done) if row["arm"] == "plain") / 4
    assert analysis["continual"]["plain"]["bwt"]["mean"] == pytest.approx(mean)


def test_the_report_has_the_matrices_and_the_measures(done: Path) -> None:
    pair = json.loads((done / "analysis.json").read_text(encoding="utf-8"))["against_baseline"]["replay"]
    page = (done / "report.html").read_text(encoding="utf-8")
    for words in ("Stream of tasks", "backward transfer", "forgetting", "plasticity", "letters", "digits"):
        assert words in page
    assert f"in these orders {bounds(pair['same_orders_low'], pair['same_orders_high'], '+.4f')}" in page
    known = [summary(done, row["run"])["score_matrix"] for row in rows(done) if row["arm"] == "replay"]
    for value in np.mean(known, axis=0).flatten():
        assert f">{value:.2f}<" in page


# Texts and mistakes ---------------------------------------------------------------------------------------------------


def test_a_part_of_the_standard_library_is_named_by_a_glob() -> None:
    whole = set(find_source("stdlib").files)
    email = find_source("stdlib:email/**/*.py").files
    flat = find_source("stdlib:email/*.py").files
    assert set(flat) < set(email) < whole
    assert {file.parent.name for file in email} == {"email", "mime"}
    assert [file.name for file in find_source("stdlib:pydoc_data/topics.py").files] == ["topics.py"]
    assert set(find_source("stdlib:**").files) == whole


@pytest.mark.parametrize("pattern", ["", "nothing/*.py", "../*", "/etc/*", "email", "test/*.py", "EMAIL/*.py"])
def test_a_glob_that_matches_no_module_is_refused(pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"stdlib:.*expected a glob (below|that matches).*such as stdlib:email"
    ) as caught:
        find_source(f"stdlib:{pattern}")
    assert "\n" not in str(caught.value)


def test_a_stream_survives_its_own_yaml(texts: dict[str, str], tmp_path: Path) -> None:
    study = stream_study(texts, quick={"seeds": [0], "orders": [["digits", "letters"]]})
    save_study(study, tmp_path / "study.yaml")
    assert study_values(load_study(tmp_path / "study.yaml")) == study_values(study)
    quick = expand(load_study(tmp_path / "study.yaml", quick=True))
    assert [run.order for run in quick] == [("digits", "letters")] * 2
    unsaid = expand(replace(study, orders=(), quick={}))
    assert {run.order for run in unsaid} == {("letters", "digits")}


TWO = "tasks: {a: stdlib, b: 'stdlib:email/*.py'}\n"
MISTAKES = {
    "tasks: {a: stdlib}": "tasks: expected two or more, got 'a'; add one",
    "tasks: {a: stdlib, b: }": "tasks.b: expected text, got",
    "tasks: {a: stdlib, b: ''}": "tasks.b: expected a name and what `data` takes, got ''",
    "tasks: [a, b]": "tasks: expected keys and values below it",
    "orders: [[a, b]]": "orders: expected none without tasks",
    TWO + "orders: [[a, c]]": "orders[1]: unknown task 'c'; known are a, b",
    TWO + "orders: [[a, b], [b]]": "orders[2]: expected every task once (a, b), got ['b']",
    TWO + "orders: [[a, b, b]]": "orders[1]: expected every task once",
    TWO + "orders: [[a, b], [a, b]]": "orders: expected each only once",
    TWO + "orders: [a]": "orders[1]: expected a list, got 'a'",
    TWO + "orders: [[1, 2]]": "orders[1][1]: expected text, got 1",
    TWO + "base: {steps: 5}": "steps: expected a multiple of the number of tasks (2)",
    TWO + "axes: {data: [x, y]}": "data: expected no arm or axis that sets it beside tasks",
    TWO + "base: {replay: 1.5}": "replay: expected 0 or more and less than 1, got 1.5",
    TWO + "quick: {orders: [[b]]}": "quick.orders",
    "base: {replay: 0.5}": "replay: expected 0 in a study without tasks, got 0.5",
    "base: {split: tail}\ntasks: {a: 'stdlib:re/*.py', b: nowhere.txt}": "nowhere.txt: expected stdlib, a file",
}


@pytest.mark.parametrize(("lines", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_bad_stream_gets_one_line(
    lines: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.study.plan.available_memory", lambda: 0)
    path = tmp_path / "bad.yaml"
    path.write_text(f"margin: 0.02\nseeds: [0]\n{lines}\n", encoding="utf-8")
    flags = ["--quick"] if "quick" in lines else []
    assert main(["study", str(path), "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert message.removeprefix("quick.") in said
    assert [line for line in said.splitlines() if line.startswith("tiny-onn: ")] == said.splitlines()[-1:]
    assert not (tmp_path / "out").exists()


def test_replay_without_a_stream_is_refused_in_a_single_run(texts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"replay: expected 0 outside a study with tasks, got 0\.25"):
        train(RunConfig(data=texts["letters"], replay=0.25, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
