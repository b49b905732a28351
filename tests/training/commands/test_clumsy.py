"""Clumsy commands: the answer is one line that names what was typed, and following its advice works."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from tests.training.run.test_engine import TEXT, train
from tiny_onn_func import ModelConfig
from training import Batch, HyperParams, hyper_step, init_state
from training.cli import main
from training.commands.doctor import Finding, examine
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


def advised(folder: Path) -> list[Finding]:
    """What the doctor finds wrong with a folder, not with the machine."""
    return [found for found in examine(folder) if found.advice and str(folder) in found.text + found.advice]


def begun_run(tmp_path: Path, name: str = "run", *flags: str) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    train(tmp_path / "text.txt", tmp_path / name, "--steps=4", "--eval-every=0", "--sample-tokens=0", *flags)
    return tmp_path / name


WAITING = """
import os, signal, sys, threading, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # as a terminal does while torch is imported
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
sys.meta_path.insert(0, Finder())
from training.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["train", "evaluate", "doctor"])
def test_ctrl_c_while_torch_is_imported_ends_with_130_and_no_traceback(verb: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", WAITING, verb, "x"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
    assert time.monotonic() - begun < 60


def test_the_command_line_and_its_packages_begin_without_torch() -> None:
    code = "import sys, training.cli, tiny_onn_func, training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_the_handler_of_ctrl_c_is_as_it_was_after_a_command(run: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", str(run), "--tokens=1"]) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_by_nan_goes_on_as_the_doctor_advises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun_run(tmp_path, "run", "--hyper.lr=1e30")
    (advice,) = (found.advice for found in advised(run) if found.subject == "unfinished")
    command = advice.partition(";")[0]
    assert command == f"tiny-onn train --out {run} --resume --on-nonfinite skip"
    assert main(["train", "--out", str(run), "--resume"]) == 2, "plain --resume meets the same step again"
    assert main(shlex.split(command)[1:]) == 0
    assert "unfinished" not in [found.subject for found in advised(run)]
    capsys.readouterr()


def test_a_run_that_skips_bad_steps_is_resumed_by_plain_resume(tmp_path: Path) -> None:
    run = begun_run(tmp_path, "run", "--hyper.lr=1e30", "--on-nonfinite=skip")
    (run / "summary.json").unlink()
    (found,) = (found for found in advised(run) if found.subject == "unfinished")
    assert found.advice == f"tiny-onn train --out {run} --resume"


def test_all_damaged_checkpoints_are_removed_as_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun_run(tmp_path, "run", "--checkpoint-every=1", "--keep-checkpoints=3")
    for state in (run / "checkpoints").glob("*/state.safetensors"):
        state.write_bytes(b"x")
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("; none is whole: remove the folder checkpoints, and --resume begins anew\n")
    shutil.rmtree(run / "checkpoints")
    (found,) = advised(run)
    assert (found.subject, found.advice) == ("checkpoint", f"`tiny-onn train --out {run} --resume` begins anew")
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert advised(run) == []


def test_a_file_in_the_place_of_the_checkpoints_is_refused_before_the_records_are_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("x", encoding="utf-8")
    before = (run / "metrics.jsonl").read_bytes()
    said = refused(["train", "--out", str(run), "--resume"], capsys)
    assert said == f"tiny-onn: {run}/checkpoints: expected a folder of checkpoints, got a file; move it away\n"
    assert (run / "metrics.jsonl").read_bytes() == before
    (found,) = advised(run)
    assert found.advice.startswith("move it away; then ")
    (run / "checkpoints").unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0


def test_a_run_without_its_settings_is_not_sent_round_in_a_circle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path)
    settings = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    resume = ["train", "--out", str(run), "--resume"]
    assert refused(resume, capsys).endswith("no config.yaml; restore the file, or name another folder\n")
    (run / "config.yaml").mkdir()
    assert refused(resume, capsys).startswith(f"tiny-onn: {run}/config.yaml: expected a file, got ")
    (run / "config.yaml").rmdir()
    (run / "config.yaml").write_bytes(settings)
    assert main(resume) == 0


@pytest.mark.parametrize("score", ['"x"', "[]", "{}"])
def test_the_doctor_finds_a_summary_whose_score_is_no_number(score: str, tmp_path: Path) -> None:
    run = begun_run(tmp_path)
    (run / "summary.json").write_text(f'{{"nats_per_token": {score}}}', encoding="utf-8")
    (found,) = advised(run)
    assert found.subject == "summary"
    (run / "summary.json").unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert advised(run) == []


def test_what_stands_in_the_way_of_a_picture_is_named_and_not_its_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path)
    (run / "report.html").mkdir()
    said = refused(["report", str(run)], capsys)
    assert said == f"tiny-onn: {run}/report.html: Is a directory; move it away, or name another\n"
    (run / "report.html").rmdir()
    assert main(["report", str(run)]) == 0
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    words = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "link")]
    assert refused(words, capsys) == f"tiny-onn: {tmp_path}/link: File exists; move it away, or name another\n"


STUDY = {
    "question": "Does it?", "margin": 0.02, "falsifier": "No.", "baseline": "a", "seeds": [0, 1],
    "arms": [{"name": "a"}, {"name": "b", "set": {"hyper.lr": 0.01}}],
    "base": {
        "steps": 2, "batch_size": 2, "sequence_length": 16, "final_eval_bytes": 200,
        "model": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("study")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    study = {**STUDY, "base": {**STUDY["base"], "data": str(home / "text.txt")}}  # type: ignore[dict-item]
    (home / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(home / "cache"))
        assert main(["study", str(home / "study.yaml"), "--out", str(home / "study")]) == 0
    return home / "study"


@pytest.fixture
def study(finished_study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_study, tmp_path / "study"))


def test_a_verb_for_a_run_says_where_the_runs_of_a_study_are(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["evaluate"], ["generate"], ["rerun", "--step=1"], ["export", f"--out={study}-hf"]):
        said = refused([verb[0], str(study), *verb[1:]], capsys)
        assert said.endswith(f"; the runs of this study are in {study}/runs\n")
    assert main(["evaluate", f"{study}/runs/a-seed0"]) == 0
    said = refused(["train", "--out", str(study), "--resume"], capsys)
    command = re.search(r"`tiny-onn (.+)`", said)
    assert command
    assert main(shlex.split(command[1])) == 0


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n,", b"a,b\n1,2\n", None])
def test_a_broken_table_of_results_is_found_and_made_anew_as_advised(
    content: bytes | None, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = study / "results.csv"
    table.unlink()
    if content is not None:
        table.write_bytes(content)
    (found,) = advised(study)
    assert str(table) in found.text
    assert main(["report", str(study)]) == 2
    if found.advice.startswith("remove the file"):
        table.unlink()
    assert main(["study", "--out", str(study), "--resume"]) == 0
    assert main(["report", str(study)]) == 0
    assert advised(study) == []
    capsys.readouterr()


def test_a_study_without_its_settings_or_its_runs_is_found_and_mended_as_advised(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (study / "study.yaml").read_bytes()
    (study / "study.yaml").write_bytes(b"")
    (found,) = (found for found in examine(study) if found.advice)
    assert (found.subject, found.advice) == ("study", "restore the file")
    (study / "study.yaml").write_bytes(settings)
    shutil.rmtree(study / "runs")
    (found,) = advised(study)
    assert found.advice == f"remove {study}/results.csv; `tiny-onn study --out {study} --resume` makes them"
    (study / "results.csv").unlink()
    assert main(["study", "--out", str(study), "--resume"]) == 0
    assert advised(study) == []
    capsys.readouterr()


def test_lost_records_of_a_run_of_a_study_cost_its_results_nothing(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "runs" / "a-seed0" / "metrics.jsonl").unlink()
    (found,) = advised(study)
    assert found.advice == "restore the file; the results of the study stand without it"
    assert main(["report", str(study)]) == 0
    capsys.readouterr()


SIZES = ModelConfig(
    vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    moe_intermediate_size=8, num_experts=4,
)  # fmt: skip
IDS = torch.arange(16).view(2, 8)
BATCH = Batch(IDS, IDS, torch.ones_like(IDS))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"hyper": HyperParams(lr="0.1")}, "hyper.lr: expected a number or a 0-d tensor, got '0.1'"),  # type: ignore[arg-type]
        ({"hyper": HyperParams(lr=None)}, "hyper.lr: expected a number or a 0-d tensor, got None"),  # type: ignore[arg-type]
        ({"hyper": HyperParams(eps=[1e-8])}, "hyper.eps: expected a number or a 0-d tensor, got [1e-08]"),  # type: ignore[arg-type]
        ({"hyper": HyperParams(lr=1j)}, "hyper.lr: expected a number or a 0-d tensor, got 1j"),  # type: ignore[arg-type]
        ({"hyper": HyperParams(lr=float("nan"))}, "hyper.lr: expected 0 or more, got nan"),
        ({"batch": BATCH._replace(input_ids=[[1]])}, "input_ids: expected a tensor, got list; "),
        ({"batch": BATCH._replace(attention_mask=None)}, "attention_mask: expected a tensor, got NoneType; "),
        ({"compute_dtype": torch.int64}, "compute_dtype: expected a floating point torch.dtype or None, got torch.int"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else None,
)
def test_a_step_names_what_it_cannot_take(typed: dict[str, object], said: str) -> None:
    state = init_state(SIZES, torch.Generator().manual_seed(0))
    words = {"batch": BATCH, "hyper": HyperParams(), **typed}
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        hyper_step(state, config=SIZES, **words)  # type: ignore[arg-type]


UNCHECKED = """
from tests.training.commands.test_clumsy import BATCH, SIZES, HyperParams, hyper_step, init_state, torch
state = init_state(SIZES, torch.Generator().manual_seed(0))
for words in ({"batch": tuple(BATCH)}, {"hyper": {"lr": 0.1}}, {"compute_dtype": "bfloat16"}):
    try:
        hyper_step(state, config=SIZES, **{"batch": BATCH, "hyper": HyperParams(), **words})
    except ValueError as error:
        print(error)
"""


def test_a_step_names_the_values_that_the_tests_own_type_checks_would_refuse_first() -> None:
    ended = subprocess.run([sys.executable, "-c", UNCHECKED], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines() == [
        "batch: expected a Batch, got tuple; Batch(input_ids, labels, mask) is one",
        "hyper: expected HyperParams, got dict; HyperParams(lr=1e-3) has all others, too",
        "compute_dtype: expected a floating point torch.dtype or None, got 'bfloat16'",
    ]
