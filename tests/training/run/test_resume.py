"""A run goes on where it stopped: from the newest whole checkpoint, alone in its folder, with the same settings."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.helpers import ROOT, assert_same_bits
from tests.training.run.test_engine import SMALL, TEXT, interrupted_after, records, train
from training.cli import main
from training.commands.doctor import examine
from training.data.corpus import fingerprint, open_corpus
from training.errors import UserError
from training.run.engine import train as train_run
from training.run.settings import load_settings, parse_train_args
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import latest_checkpoint, load_checkpoint, named_tensors, save_checkpoint
from training.storage.checkpoint_files import clean
from training.storage.lock import HOLDER, LOCK, holder, locked


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Path:
    """Stopped in its sixth step of eight, with checkpoints of steps 2, 4 and 5."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.program.hyper_step", interrupted_after(5))
        flags = ("--steps=8", "--checkpoint-every=2", "--keep-checkpoints=9", "--eval-every=0")
        assert train(text, out, *flags) == 130
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["2", "4", "5"]
    return out


def resume(out: Path, *flags: str) -> int:
    return main(["train", "--out", str(out), "--resume", *flags])


def damage(folder: Path) -> None:
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.safetensors").write_bytes(data)


def final(out: Path) -> tuple[dict, list[dict]]:
    kept = [{key: value for key, value in record.items() if key != "seconds"} for record in records(out)]
    return load_checkpoint(out / "checkpoints" / "step_000008"), kept


# The newest whole checkpoint


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_gives_the_same_end(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "whole", "--steps=8", "--eval-every=0") == 0
    damage(run / "checkpoints" / "step_000005")
    capsys.readouterr()
    assert resume(run) == 0
    warning = capsys.readouterr().err.split("\n")[0]
    assert warning.startswith(f"warning: {run}/checkpoints/step_000005/state.safetensors: expected SHA-256 ")
    assert warning.endswith("using step_000004")
    (mine, my_records), (theirs, their_records) = final(run), final(tmp_path / "whole")
    assert_same_bits(mine, theirs)
    assert my_records == their_records
    assert not (run / "checkpoints" / "step_000005").exists(), "nobody is warned of it again"


def test_every_reader_of_a_run_passes_over_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "checkpoints" / "step_000005")
    for verb in (["evaluate", str(run)], ["generate", str(run), "--tokens", "2"]):
        capsys.readouterr()
        assert main(verb) == 0
        assert capsys.readouterr().err.count("using step_000004") == 1


def test_when_all_are_damaged_the_oldest_is_named_and_nothing_is_trained(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (run / "checkpoints").iterdir():
        damage(folder)
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert resume(run) == 2
    said = capsys.readouterr().err.split("\n")[-2]
    assert said.startswith(f"tiny-onn: {run}/checkpoints/step_000002/state")
    assert said.endswith("none is whole: remove the folder checkpoints, and --resume begins anew")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "expected", "got"),
    [(2, 3, "that of step 4"), (4, 5, "none"), (None, 1, "none"), (-2, 3, "that of step 1")],
)
def test_a_run_does_not_go_on_over_a_gap_in_its_record_and_the_advice_mends_it(
    line: int | None, expected: int, got: str, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    if line is None:
        path.unlink()
    else:
        path.write_text("".join(lines[:2] * 2 + lines[2:] if line < 0 else lines[:line] + lines[line + 1 :]))
    capsys.readouterr()
    assert resume(run) == 2
    said = capsys.readouterr().err.split("\n")[-2]
    assert said.startswith(f"tiny-onn: {path}: expected the record of step {expected}, got {got}; ")
    (fault,) = [finding for finding in examine(run) if finding.advice and finding.subject == "records"]
    assert fault.advice in said
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[-1]) >= expected:
            shutil.rmtree(folder)
    assert resume(run) == 0
    assert train(text, tmp_path / "whole", "--steps=8", "--eval-every=0") == 0
    assert final(run)[1] == final(tmp_path / "whole")[1]
    assert not [finding for finding in examine(run) if finding.advice and finding.subject == "records"]


def test_a_run_of_a_study_goes_on_with_its_study_alone_and_the_doctor_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    shutil.copytree(run, study / "runs" / "plain-seed0", ignore=shutil.ignore_patterns("checkpoints"))
    (study / "study.yaml").write_text("question: x\n", encoding="utf-8")
    before = (study / "runs" / "plain-seed0" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert resume(study / "runs" / "plain-seed0") == 2
    advice = f"tiny-onn study --out {study} --resume"
    assert advice in capsys.readouterr().err
    assert (study / "runs" / "plain-seed0" / "metrics.jsonl").read_bytes() == before
    (fault,) = [finding for finding in examine(study) if finding.advice]
    assert (fault.subject, fault.text, fault.advice) == ("unfinished", "1 of 1 runs", advice)


def test_a_study_is_not_made_in_the_folder_of_a_run_nor_a_run_in_that_of_a_study(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {
        "question": "x", "falsifier": "y", "margin": 0.02, "baseline": "a", "seeds": [0, 1],
        "base": {"data": str(text), "steps": 2}, "arms": [{"name": "a"}, {"name": "b", "set": {"hyper.lr": 0.01}}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert main(["study", str(tmp_path / "study.yaml"), f"--out={run}"]) == 2
    assert f"--out: expected a folder for a study, got {run}, which holds a run" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "study.yaml").write_text("question: x\n", encoding="utf-8")
    assert train(text, other, "--steps=8") == 2
    assert f"--out: expected a folder for a run, got {other}, which holds a study" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["study.yaml"]


def test_a_fresh_run_never_goes_on_from_checkpoints_that_lie_in_its_folder(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).unlink()
    assert train(text, run, "--steps=8") == 2
    assert "with checkpoints and no config.yaml" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.storage.atomic.os.fsync", full)
    assert train(text, tmp_path / "run", "--steps=1") == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith(f"tiny-onn: {tmp_path}: No space left")


def test_a_checkpoint_of_another_version_is_refused_not_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = run / "checkpoints" / "step_000005" / "meta.json"
    meta.write_text(meta.read_text(encoding="utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")
    capsys.readouterr()
    assert resume(run) == 2
    said = capsys.readouterr().err
    assert "expected format 1 of version" in said
    assert "got 2 of" in said


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_with_resume(
    run: Path, text: Path, tmp_path: Path
) -> None:
    assert train(text, tmp_path / "whole", "--steps=8", "--eval-every=0") == 0
    for folder in (run / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert resume(run) == 0
    assert_same_bits(final(run)[0], final(tmp_path / "whole")[0])
    assert final(run)[1] == final(tmp_path / "whole")[1]


def test_a_checkpoint_that_stepped_aside_for_one_that_never_came_comes_back(tmp_path: Path) -> None:
    state = {"params": {"a": torch.ones(3)}, "step": torch.tensor(7)}
    path = save_checkpoint(tmp_path, state, {}, keep=2)
    path.rename(path.with_name(".draft-aside-step_000007"))  # as a kill between two renamings leaves it
    clean(tmp_path / "checkpoints")
    assert latest_checkpoint(tmp_path) == path
    assert_same_bits(load_checkpoint(tmp_path), state)


def test_the_checkpoint_of_the_best_score_stays(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, {"step": torch.tensor(step)}, {}, keep=2, best=2 if step > 1 else None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000002", "step_000005", "step_000006",
    ]  # fmt: skip


def test_the_best_step_of_a_run_is_that_of_its_lowest_held_out_loss(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--steps=12", "--eval-every=2", "--checkpoint-every=0", "--keep-checkpoints=1", "--hyper.lr=0.3")
    assert train(text, out, *flags) == 0
    scores = {r["step"]: r["held_out_nats"] for r in records(out) if r.get("held_out_nats") is not None}
    best = min(scores, key=scores.__getitem__)
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["best_step"] == best
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step_{best:06d}", "step_000012"]
    assert main(["evaluate", str(out / "checkpoints" / f"step_{best:06d}")]) == 0


# The same settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hyper.lr=0.25", "--seed=3"], "got hyper.lr 0.25 for 0.002, seed 3 for 0; go on"),
        (["--model.hidden-size=32"], "got model.hidden_size 32 for 16; go on"),
        (["--batch-size=3"], "got batch_size 3 for 2; go on"),
    ],
)
def test_other_settings_are_refused_with_every_difference(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resume(run, *flags) == 2
    line = capsys.readouterr().err
    assert line.startswith("tiny-onn: --resume: expected the settings and the text that ")
    assert said in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_only_watched_and_how_far_it_goes_may_change(run: Path) -> None:
    assert resume(run, "--steps=9", "--eval-every=3", "--keep-checkpoints=1", "--sample-tokens=0") == 0
    assert records(run)[-1]["step"] == 9


def test_another_text_under_the_same_name_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("least", "LEAST", 1), encoding="utf-8")
    capsys.readouterr()
    assert resume(run, f"--data={other}") == 2
    assert "got another text; go on" in capsys.readouterr().err
    other.write_text(TEXT, encoding="utf-8")
    assert resume(run, f"--data={other}") == 0, "the same text may have moved"


def test_the_fingerprint_sees_one_token_of_either_side(text: Path, tmp_path: Path) -> None:
    def of(content: str) -> str:
        path = tmp_path / "some.txt"
        path.write_text(content, encoding="utf-8")
        return fingerprint(open_corpus(str(path), sequence_length=16))

    assert of(TEXT) == of(TEXT)
    assert len({of(TEXT), of("T" + TEXT[1:]), of(TEXT[:-2] + "!\n"), of(TEXT + "\n")}) == 4


# Alone in its folder


def test_the_second_process_on_a_folder_is_refused_by_name_and_writes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(run):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert resume(run) == 2
        line = f"tiny-onn: {run}: expected a folder at rest, got one in use by process {os.getpid()} on "
        assert capsys.readouterr().err.startswith(line)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (run / LOCK).exists()
    assert not (run / HOLDER).exists()
    assert resume(run) == 0


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom training.storage.lock import locked\n"
        "with locked(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        assert (holder(tmp_path) or "").startswith(f"process {child.pid} on ")
        with pytest.raises(UserError, match=f"in use by process {child.pid} on "), locked(tmp_path):
            pass
    finally:
        child.kill()
        child.communicate()
    assert (tmp_path / LOCK).exists()
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert (holder(tmp_path) or "").startswith(f"process {os.getpid()} on ")


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_a_lock_on_a_file_that_its_last_holder_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, tries = FileLock.acquire, []

    def late(self: FileLock, *args: Any, **options: Any) -> Any:
        acquired = acquire(self, *args, **options)
        tries.append(1)
        if len(tries) == 1:  # it was opened before, and is locked after, the removal
            (tmp_path / LOCK).unlink()
        return acquired

    monkeypatch.setattr(FileLock, "acquire", late)
    with locked(tmp_path):
        assert holder(tmp_path) is not None, "another process could take it"
    assert len(tries) == 2


@pytest.mark.parametrize("present", [False, True])
def test_a_look_at_the_holder_leaves_a_folder_as_it_was(tmp_path: Path, present: bool) -> None:
    if present:
        (tmp_path / LOCK).touch()
    before = [*tmp_path.iterdir()]
    assert holder(tmp_path) is None
    assert [*tmp_path.iterdir()] == before


def test_a_process_that_waits_takes_the_lock_when_the_holder_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom training.storage.lock import locked\n"
        "with locked(sys.argv[1]):\n print(1, flush=True)\n time.sleep(1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        with locked(tmp_path, patience=60.0):
            assert (holder(tmp_path) or "").startswith(f"process {os.getpid()} on ")
    finally:
        child.communicate(timeout=60)
    assert child.returncode == 0


# In the background


def test_a_step_goes_on_while_its_checkpoint_is_written_and_the_next_one_waits() -> None:
    events: list[str] = []

    def slow(state: int) -> None:
        time.sleep(0.2)
        events.append(f"written {state}")

    with BackgroundSaver(slow) as saver:
        saver.save(1)
        events.append("step")
        saver.save(2)
        events.append("step")
    assert events == ["step", "written 1", "step", "written 2"]


def test_what_the_disk_said_is_raised_once_at_the_next_save_or_at_the_end() -> None:
    def refuse(state: int) -> None:
        raise UserError(f"no room for {state}")

    saver = BackgroundSaver(refuse)
    saver.save(1)
    with pytest.raises(UserError, match="no room for 1"):
        saver.save(2)
    saver.wait()
    saver.save(3)
    with pytest.raises(UserError, match="no room for 3"):
        saver.__exit__(None)


def test_records_are_on_the_disk_before_the_checkpoint_of_their_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {b}"), replace(a, b)))
    out = tmp_path / "run"
    assert train(text, out, "--steps=2", "--checkpoint-every=0", "--eval-every=0") == 0
    published = events.index(f"-> {out}/checkpoints/step_000002")
    assert str(out / "metrics.jsonl") in events[:published]
    assert str(out) in events[:published], "the record's own name"
    assert str(out / "config.yaml") in "".join(events[:published])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_signal_saves_says_how_to_go_on_and_the_end_is_the_same(
    text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = ("--steps=40", "--eval-every=0", "--sample-tokens=0", "--picture-every=0")
    assert train(text, whole, *flags) == 0
    command = [sys.executable, "-m", "training", "train", "--data", str(text), "--out", str(out), *SMALL, *flags]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes()) < 10:
        assert child.poll() is None, "it ended before it could be stopped"
        time.sleep(0.005)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.decode().rstrip().split("\n")[-1] == f"stopped; go on with: tiny-onn train --out {out} --resume"
    step = records(out)[-1]["step"]
    assert step < 40
    assert latest_checkpoint(out) is not None
    train_run(load_settings(str(out / "config.yaml")), resume=True)
    assert_same_bits(load_checkpoint(out), load_checkpoint(whole))
    assert [r["step"] for r in records(out)] == list(range(1, 41))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "picture"), BrokenPipeError(), RuntimeError("odd")])
def test_whatever_stops_a_run_the_last_whole_step_is_saved(
    error: Exception, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: object) -> None:
        raise error

    monkeypatch.setattr("training.run.loop.draw", fails)
    flags = ["--data", str(text), "--out", str(tmp_path / "run"), *SMALL, "--steps=9", "--picture-every=3"]
    config, _ = parse_train_args(flags)
    with pytest.raises(type(error)):
        train_run(config)
    assert latest_checkpoint(tmp_path / "run").name == "step_000003"


def test_nobody_reading_the_output_is_no_mistake_of_a_file() -> None:
    command = [sys.executable, "-m", "training", "train", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


@pytest.mark.skipif(sys.platform != "linux", reason="no Linux, where alone a thread has a niceness of its own")
def test_the_writing_gives_way_to_the_steps() -> None:
    nice: list[int] = []
    with BackgroundSaver(lambda: nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))) as saver:
        saver.save()
    assert nice == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


def test_what_is_ready_to_be_saved_is_not_copied_and_what_shares_memory_is() -> None:
    whole, base = torch.arange(6.0), torch.arange(10.0)
    state = {
        "step": torch.tensor(3),
        "whole": whole,
        "part": base[2:4],
        "column": base.view(5, 2)[:, 0],
        "twice": whole,
    }
    ready = named_tensors(state)
    for name, leaf in state.items():
        assert torch.equal(ready[name], leaf)
        assert ready[name].untyped_storage().nbytes() == leaf.nbytes
    assert ready["whole"].data_ptr() == whole.data_ptr()
    assert ready["twice"].data_ptr() != whole.data_ptr()
    again = named_tensors(ready)
    assert [t.data_ptr() for t in again.values()] == [t.data_ptr() for t in ready.values()], "nothing left to do"
