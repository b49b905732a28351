"""Kills, failing disks and power cuts: a run comes back from each with the bits of the run that met none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.robustness.power_cut import HEAD, Operation, cut_before, read_log

COMPILER = shutil.which("cc") or shutil.which("gcc")
wants_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the shim with")


def lost(tmp_path: Path, *flags: str) -> tuple[list[dict], list[dict]]:
    """All tries of the program, and those after which something was lost or corrupt."""
    out = tmp_path / "tries.json"
    command = [sys.executable, "-m", "tests.robustness.faults", "--json", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, timeout=20_000)
    tries = json.loads(out.read_text(encoding="utf-8"))
    return tries, [attempt for attempt in tries if attempt["wrong"]]


@wants_compiler
def test_a_run_and_a_study_come_back_from_a_sample_of_all_faults(tmp_path: Path) -> None:
    flags = ("--kills=2", "--signals=2", "--spoil=5", "--cuts=4")
    tries, bad = lost(tmp_path, "--of", "run", "cache", *flags)
    assert bad == []
    met = " ".join(attempt["fault"] for attempt in tries)
    for kind in ("kill -9, run", "SIG", "a call", "TensorBoard", "power cut"):
        assert kind in met
    assert len(tries) >= 20


@pytest.mark.slow
@wants_compiler
def test_a_study_of_vmapped_runs_comes_back_from_a_sample_of_all_faults(tmp_path: Path) -> None:
    tries, bad = lost(tmp_path, "--of", "study", "--kills=10", "--signals=6", "--spoil=40", "--cuts=40")
    assert bad == []
    assert len(tries) > 80


@pytest.mark.slow
@wants_compiler
def test_two_hundred_kills_every_call_in_every_mode_and_every_power_cut_lose_nothing(tmp_path: Path) -> None:
    tries, bad = lost(tmp_path)
    assert bad == []
    assert sum(attempt["kills"] for attempt in tries) >= 200
    assert len(tries) > 1500


@pytest.mark.slow
@wants_compiler
def test_the_program_finds_a_run_that_does_not_flush(tmp_path: Path) -> None:
    """The records of a checkpoint's steps are not waited for: after a power cut the record has a gap."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "__pycache__", "docs"))
    loop = copy / "training" / "run" / "loop.py"
    source = loop.read_text(encoding="utf-8")
    assert "    recorder.sync()\n" in source
    loop.write_text(source.replace("    recorder.sync()\n", ""), encoding="utf-8")
    command = [sys.executable, "-m", "tests.robustness.faults", "--of", "run", "--only", "cuts"]
    ended = subprocess.run(
        command, cwd=copy, capture_output=True, timeout=600, env=os.environ | {"PYTHONPATH": str(copy)}
    )
    assert ended.returncode == 1
    assert b"LOST: power cut" in ended.stderr


# The model of a disk


def left(disk: Path, operations: list[Operation], at: int, *, names_stay: bool) -> dict[str, bytes]:
    """Relative name -> content of all files after a power cut."""
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    cut_before(operations, at, disk, names_stay=names_stay)
    return {str(file.relative_to(disk)): file.read_bytes() for file in disk.rglob("*") if file.is_file()}


def test_what_was_not_flushed_is_lost_and_what_was_is_there(tmp_path: Path) -> None:
    disk = str(tmp_path / "disk")
    draft, file = f"{disk}/draft", f"{disk}/file"
    operations = [
        Operation("T", draft, "", b""), Operation("W", draft, "", b"abc"), Operation("S", draft, "", b""),
        Operation("W", draft, "", b"def"), Operation("R", draft, file, b""), Operation("S", disk, "", b""),
        Operation("U", file, "", b""), Operation("S", disk, "", b""),
    ]  # fmt: skip
    for at, names_stay, want in (
        (2, True, {"draft": b""}), (3, True, {"draft": b"abc"}), (3, False, {}), (5, True, {"file": b"abc"}),
        (5, False, {}), (6, False, {"file": b"abc"}), (7, True, {}), (7, False, {"file": b"abc"}), (8, False, {}),
    ):  # fmt: skip
        assert left(tmp_path / "disk", operations, at, names_stay=names_stay) == want, (at, names_stay)


def test_a_folder_that_is_renamed_keeps_what_is_durable_in_it_and_no_name_is_durable_before_its_folder(
    tmp_path: Path,
) -> None:
    disk = str(tmp_path / "disk")
    old, new = f"{disk}/old", f"{disk}/new"
    operations = [
        Operation("M", old, "", b""), Operation("T", f"{old}/a", "", b""), Operation("W", f"{old}/a", "", b"1"),
        Operation("S", f"{old}/a", "", b""), Operation("S", old, "", b""), Operation("R", old, new, b""),
        Operation("S", disk, "", b""), Operation("R", new, old, b""),
    ]  # fmt: skip
    for at, want in ((5, {}), (6, {}), (7, {"new/a": b"1"}), (8, {"new/a": b"1"})):
        assert left(tmp_path / "disk", operations, at, names_stay=False) == want, at
    without_names = [*operations[:4], *operations[5:]]
    assert left(tmp_path / "disk", without_names, 6, names_stay=False) == {}


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    parts = [(b"W", b"/x/a", b"", b"some\n"), (b"R", b"/x/a", b"/x/b", b"")]
    log = b"".join(HEAD.pack(ord(k), len(a), len(b), len(c)) + a + b + c for k, a, b, c in parts)
    (tmp_path / "log").write_bytes(log)
    assert read_log(tmp_path / "log") == [Operation("W", "/x/a", "", b"some\n"), Operation("R", "/x/a", "/x/b", b"")]
