"""NaN and infinity are caught in their step and never become a state; the step can be made again to see why."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_same_bits, seeded, tiny_batch, tiny_config
from tests.training.run.test_engine import TEXT, records, train
from tiny_onn_func.tree import stack, tree_map, walk
from training import Batch, HyperParams, hyper_step, init_state
from training.cli import main
from training.commands.doctor import Finding, examine
from training.run.nonfinite import MOST, bad_numbers
from training.step.finite import WATCHED, bad_runs, finite_runs, passed_over, where_runs
from training.step.hyper_step import TrainState
from training.step.surprise import nonfinite_surprise
from training.storage.checkpoint import load_checkpoint
from training.storage.recorder import to_record

CONFIG = tiny_config(num_hidden_layers=1)
WILD = ("--hyper.lr=1e30", "--hyper.max-grad-norm=1e30", "--eval-every=0", "--sample-tokens=0", "--picture-every=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


def stepped() -> tuple[TrainState, dict[str, Any]]:
    state, metrics = hyper_step(init_state(CONFIG, seeded(0)), tiny_batch(CONFIG), HyperParams(), CONFIG)
    return state, to_record(metrics)


# What is bad


def test_a_good_step_has_no_bad_numbers() -> None:
    state, record = stepped()
    assert bad_numbers(record, state) == []


@pytest.mark.parametrize("name", WATCHED)
def test_every_watched_number_is_seen(name: str) -> None:
    state, record = stepped()
    assert bad_numbers(record | {name: None}, state) == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("leaf", ["params.layers.moe.w2", "params.layers.moe.router", "expert_opt.nu.embed_tokens"])
def test_a_single_bad_entry_of_a_state_is_seen_and_named(leaf: str, value: float) -> None:
    state, record = stepped()
    spoiled = tree_map(torch.clone, state)
    dict(walk(spoiled))[leaf].view(-1)[3] = value
    assert bad_numbers(record, spoiled) == [leaf]


def test_a_bad_surprise_of_a_routed_token_counts_and_what_was_not_routed_does_not() -> None:
    surprise = torch.full((1, 3, 4), torch.inf)
    surprise[0, 0, 1], surprise[0, 1, 2] = 0.5, torch.nan
    ids, active = torch.tensor([[[1], [2], [3]]]), torch.tensor([[[True], [True], [True]]])
    assert int(nonfinite_surprise(surprise, ids, active)) == 2
    assert int(nonfinite_surprise(surprise, ids, active & (ids == 1))) == 0
    assert int(nonfinite_surprise(surprise, torch.where(ids == 1, ids, 99), active & (ids == 1))) == 0


def test_a_nan_in_one_expert_is_seen_in_the_step_in_which_it_appears() -> None:
    state = init_state(CONFIG, seeded(0))
    spoiled = tree_map(torch.clone, state)
    spoiled.params["layers"]["moe"]["w2"][0, 1, 0, 0] = torch.nan
    new, metrics = hyper_step(spoiled, tiny_batch(CONFIG), HyperParams(), CONFIG)
    bad_names = bad_numbers(to_record(metrics), new)
    assert {"main_loss", "grad_norm", "surprise"} <= set(bad_names)


def test_a_bad_run_is_held_back_and_its_neighbours_step_on() -> None:
    states = [init_state(CONFIG, seeded(seed)) for seed in range(3)]
    old = stack(states)
    batch = tiny_batch(CONFIG)
    results = [hyper_step(state, batch, HyperParams(), CONFIG) for state in states]
    new, metrics = stack([state for state, _ in results]), stack([metrics for _, metrics in results])
    new.params["norm"][1, 0] = torch.nan
    bad = bad_runs(metrics, new)
    assert bad.tolist() == [False, True, False]
    assert finite_runs(old).tolist() == [True, True, True]
    kept = where_runs(bad, passed_over(old), new)
    for run, want in enumerate((results[0][0], passed_over(states[1]), results[2][0])):
        assert_same_bits(tree_map(lambda leaf, run=run: leaf[run], kept), want)
    steep = metrics._replace(grad_norm=torch.tensor([1.0, 1.0, torch.inf]))
    assert bad_runs(steep, old).tolist() == [False, False, True]
    shocked = metrics._replace(nonfinite_surprise=torch.tensor([1, 0, 0]))
    assert bad_runs(shocked, old).tolist() == [True, False, False]


# What a run does


def test_a_run_stops_before_the_bad_step_with_one_line_and_a_finite_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=9", *WILD) == 2
    line = capsys.readouterr().err.split("\n")[-2]
    assert line.startswith("tiny-onn: step 2: expected finite numbers, got NaN or inf in grad_norm, surprise; stopped")
    assert f"`tiny-onn rerun {out} --step 2`" in line
    assert [record["step"] for record in records(out)] == [1]
    state = load_checkpoint(out)
    assert int(state["step"]) == 1
    assert all(bool(leaf.isfinite().all()) for _, leaf in walk(state))


def test_a_run_that_skips_keeps_its_state_says_so_and_keeps_a_few_bad_steps(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=9", "--on-nonfinite=skip", *WILD) == 0
    assert [record.get("skipped", False) for record in records(out)] == [False] + [True] * 8
    first, last = load_checkpoint(out / "nonfinite" / "checkpoints" / "step_000001")["state"], load_checkpoint(out)
    assert_same_bits(last["params"], first["params"])
    assert_same_bits(last["expert_opt"], first["expert_opt"])
    assert int(last["step"]) == 9
    assert len(list((out / "nonfinite" / "checkpoints").iterdir())) == MOST


def test_a_stopped_run_goes_on_with_skip_as_if_it_had_skipped_from_the_start(text: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert train(text, stopped, "--steps=5", *WILD) == 2
    assert main(["train", "--out", str(stopped), "--resume", "--on-nonfinite=skip"]) == 0
    assert train(text, whole, "--steps=5", "--on-nonfinite=skip", *WILD) == 0
    assert_same_bits(load_checkpoint(stopped), load_checkpoint(whole))


# The step again


def test_rerun_shows_the_bad_leaves_of_the_kept_step_and_writes_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=9", *WILD) == 2
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["rerun", str(out), "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert f"step 2, from {out}/nonfinite/checkpoints/step_000001, 0 steps" in said
    assert "NaN or infinite: grad_norm, surprise" in said
    assert "on record: no such step" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_rerun_makes_any_step_again_bit_for_bit_from_the_checkpoint_before_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=9", "--checkpoint-every=4", "--keep-checkpoints=9", "--eval-every=0") == 0
    first = "the first state of the run"
    for step, start, remade in ((1, first, 0), (4, first, 3), (8, "000004", 3)):
        capsys.readouterr()
        assert main(["rerun", str(out), "--step", str(step)]) == 0
        said = capsys.readouterr().out
        assert f"{start}, {remade} steps made again before it" in said
        assert said.rstrip().endswith("on record: the same")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[7] = json.dumps(json.loads(lines[7]) | {"avg_k": 3.5})
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    capsys.readouterr()
    said = []
    for verb in ("rerun", "replay"):  # the former name
        assert main([verb, str(out), "--step", "8"]) == 0
        said.append(capsys.readouterr().out.rstrip())
    assert said[0] == said[1]
    assert said[0].endswith("on record: other avg_k")


@pytest.mark.parametrize(("step", "said"), [("0", "--step: expected 1 to 3"), ("4", "--step: expected 1 to 3")])
def test_rerun_of_a_step_that_is_none_is_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, said: str
) -> None:
    assert train(text, tmp_path / "run", "--steps=3", "--eval-every=0", "--sample-tokens=0") == 0
    capsys.readouterr()
    assert main(["rerun", str(tmp_path / "run"), "--step", step]) == 2
    assert capsys.readouterr().err.startswith(f"tiny-onn: {said}")
    assert main(["rerun", str(tmp_path / "nowhere"), "--step", "1"]) == 2
    assert "expected a run folder with a config.yaml" in capsys.readouterr().err


# The doctor


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a compiler."""
    monkeypatch.setattr("training.commands.doctor._native", lambda: Finding("kernels", "kernels.so"))


@pytest.mark.usefixtures("kernels")
def test_the_doctor_finds_all_well_with_a_finished_run_and_names_each_fault(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=4", "--checkpoint-every=2", "--eval-every=0") == 0
    capsys.readouterr()
    assert main(["doctor", str(out)]) == 0
    said = capsys.readouterr().out
    assert "!!" not in said
    for part in (
        "python",
        "torch",
        "threads",
        "device",
        "kernels",
        "free disk",
        "4 records",
        "step_000002: whole, SHA-256 ",
    ):
        assert part in said
    data = out / "checkpoints" / "step_000002" / "state.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    (out / "checkpoints" / ".draft-step_000009").mkdir()
    (out / "summary.json").unlink()
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n", encoding="utf-8")
    assert main(["doctor", str(out)]) == 1
    faults = {finding.subject: finding for finding in examine(out) if finding.advice}
    assert faults.keys() == {"checkpoint", "checkpoints/.draft-step_000009", "records", "unfinished"}
    assert "expected SHA-256" in faults["checkpoint"].text
    assert "none is whole: remove the folder checkpoints" in faults["checkpoint"].advice
    assert faults["unfinished"].advice == f"tiny-onn train --out {out} --resume"


@pytest.mark.usefixtures("kernels")
def test_the_doctor_names_a_last_line_that_is_no_record(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=2", "--eval-every=0", "--sample-tokens=0") == 0
    assert not [finding for finding in examine(out) if finding.advice]
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "tok')
    (fault,) = [finding for finding in examine(out) if finding.advice]
    assert fault.subject == "records"
    assert 'line 3: expected a JSON object, got \'{"step": 3, "tok\'' in fault.text
    assert fault.advice.startswith("remove the line")


@pytest.mark.usefixtures("kernels")
def test_the_doctor_says_which_package_is_out_of_its_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "einops" else version(name))
    (fault,) = [finding for finding in examine() if finding.advice]
    assert (fault.subject, fault.text) == ("einops", "0.1")
    assert fault.advice.startswith("untested; pip install 'einops")


@pytest.mark.usefixtures("kernels")
def test_the_doctor_goes_on_where_a_pipe_stands_for_the_records(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=1", "--eval-every=0") == 0
    (out / "metrics.jsonl").unlink()
    os.mkfifo(out / "metrics.jsonl")
    capsys.readouterr()
    assert main(["doctor", str(out)]) == 1
    said = capsys.readouterr().out
    assert f"{out}/metrics.jsonl: a pipe or a device, no regular file  -> restore the file" in said
    assert "step_000001: whole" in said


def test_the_doctor_says_why_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINY_ONN_NATIVE", raising=False)
    monkeypatch.setenv("TINY_ONN_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    (fault,) = [finding for finding in examine() if finding.advice]
    assert fault.subject == "kernels"
    assert "others can write to this folder" in fault.text
    assert str(tmp_path) in fault.text
    monkeypatch.setenv("TINY_ONN_NATIVE", "0")
    assert "TINY_ONN_NATIVE=0" in {finding.subject: finding for finding in examine()}["kernels"].text
    assert [*tmp_path.iterdir()] == []


def test_the_doctor_refuses_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"tiny-onn: {tmp_path}/nowhere: expected the folder of a run or a study")


def test_batches_of_a_kept_step_are_those_of_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps=9", *WILD) == 2
    kept = load_checkpoint(out / "nonfinite" / "checkpoints" / "step_000001")
    batch = Batch(**kept["batch"])
    assert batch.input_ids.shape == (2, 16)
    assert bool((batch.input_ids[:, 1:] == batch.labels[:, :-1]).all())
