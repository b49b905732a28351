"""A study on Ray has the numbers of a study here, loses only what its workers had not saved, and mistakes are named."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.study.test_runner import assert_same_study, rows, small_study
from training import run_study
from training.cli import main
from training.errors import UserError
from training.storage.checkpoint_files import steps_in
from training.storage.lock import HOLDER
from training.study.config import StudyConfig
from training.study.file import save_study
from training.study.ray.launcher import gpus_of, ray_launcher
from training.study.ray.session import _check_address, session
from training.study.ray.worker import check_place, progress_of, versions
from training.study.vmapped import vmapped_step

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="no ray: the extra cluster is not installed"
)
TEXT = "the router sends each token to the expert that it surprises least.\n" * 60
STEPS, AT_ONCE = 16, 3  # three groups: three and three runs with fixed K, two with a budget


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def study(home: Path) -> StudyConfig:
    whole = small_study(str(home / "text.txt"))
    return replace(whole, base=replace(whole.base, steps=STEPS, checkpoint_every=4, eval_every=STEPS // 2, threads=1))


@pytest.fixture(scope="module")
def local(home: Path, study: StudyConfig) -> Path:
    """The same study by the local launcher."""
    run_study(study, home / "local", runs_at_once=AT_ONCE)
    return home / "local"


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[Any]:
    """One Ray of this machine for all tests that do not end it."""
    with session(None) as connected:
        yield connected


def wait_for(condition: Any, seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def worker_of(folder: Path, group: str, step: int = 4) -> int | None:
    """The process that trains a group, once the group has a checkpoint of that step."""
    home = folder / "checkpoints" / group
    try:
        words = (home / HOLDER).read_text().split()
    except OSError:
        return None
    return int(words[1]) if words and any(saved >= step for saved, _ in steps_in(home / "checkpoints")) else None


def kill_once(folder: Path, group: str, notes: dict[str, Any]) -> threading.Thread:
    """Kill the group's worker when it has saved a checkpoint, and note with what steps its successor begins."""

    def run() -> None:
        notes["killed"] = wait_for(lambda: worker_of(folder, group))
        notes["saved"] = max(step for step, _ in steps_in(folder / "checkpoints" / group / "checkpoints"))
        os.kill(notes["killed"], signal.SIGKILL)
        old = progress_of(folder, group)
        new = wait_for(lambda: (now := progress_of(folder, group)) != old and now)
        notes["first"], notes["by"] = new.made, worker_of(folder, group, 0)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# The same numbers -----------------------------------------------------------------------------------------------------


@needs_ray
def test_ray_and_the_local_launcher_leave_the_same_study(ray: Any, study: StudyConfig, local: Path, home: Path) -> None:
    result = run_study(study, home / "whole", runs_at_once=AT_ONCE, launcher=ray_launcher())
    assert_same_study(home / "whole", local)
    assert {row["status"] for row in result.rows} == {"finished"}
    assert (home / "whole" / "report.html").stat().st_size > 10_000
    assert not any((home / "whole" / "checkpoints").glob("group_*"))


@needs_ray
def test_a_tuned_study_has_both_of_its_phases_on_ray(ray: Any, study: StudyConfig, home: Path) -> None:
    tuned = replace(study, axes={"hyper.lr": (1e-3, 5e-3)}, tune=("hyper.lr",), tune_seeds=(7,), arms=study.arms[:2])
    run_study(tuned, home / "tuned here", runs_at_once=2)
    run_study(tuned, home / "tuned on ray", runs_at_once=2, launcher=ray_launcher())
    assert_same_study(home / "tuned on ray", home / "tuned here")
    assert len(rows(home / "tuned on ray")) == 4 + 4


@needs_ray
def test_a_killed_worker_loses_only_its_unfinished_group_and_no_number(
    ray: Any, study: StudyConfig, local: Path, home: Path
) -> None:
    notes: dict[str, Any] = {}
    thread = kill_once(home / "killed", "group_000", notes)
    run_study(study, home / "killed", runs_at_once=AT_ONCE, launcher=ray_launcher())
    thread.join()
    assert notes["by"] not in (None, notes["killed"])
    assert notes["first"] > AT_ONCE * notes["saved"], "its successor goes on from the checkpoint"
    assert_same_study(home / "killed", local)


@needs_ray
def test_a_group_without_retries_left_is_named_the_others_end_and_the_local_launcher_goes_on(
    ray: Any, study: StudyConfig, local: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.study.ray.launcher.RETRIES", 0)
    out = home / "lost"

    def kill() -> None:
        os.kill(wait_for(lambda: worker_of(out, "group_001")), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match=r"group_001: expected to end, lost 1 worker.*--resume --out"):
        run_study(study, out, runs_at_once=AT_ONCE, launcher=ray_launcher())
    thread.join()
    assert [row["status"] for row in rows(out)].count("finished") == 5
    run_study(study, out, resume=True)
    assert_same_study(out, local)


@needs_ray
def test_ray_goes_on_with_what_the_local_launcher_began_and_a_mistake_in_a_group_comes_back_as_itself(
    ray: Any, study: StudyConfig, local: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*of: Any) -> Any:
        step = vmapped_step(*of)

        def stepped(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == STEPS + 10:  # in step 10 of the second group
                raise KeyboardInterrupt
            return step(*args)

        return stepped

    with monkeypatch.context() as patch:
        patch.setattr("training.study.group.vmapped_step", counted)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, home / "mixed", runs_at_once=AT_ONCE)
    (home / "text.txt").write_text(TEXT[::-1], encoding="utf-8")
    with pytest.raises(UserError, match="text"):
        run_study(study, home / "mixed", resume=True, launcher=ray_launcher())
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    run_study(study, home / "mixed", resume=True, launcher=ray_launcher())
    assert_same_study(home / "mixed", local)


# The way out ----------------------------------------------------------------------------------------------------------


def processes_of(session: int) -> list[int]:
    """All living processes of a session, as the kernel lists them."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


@needs_ray
def test_ctrl_c_saves_checkpoints_ends_every_process_and_leaves_a_study_that_goes_on(
    study: StudyConfig, local: Path, home: Path
) -> None:
    out = home / "stopped"
    save_study(study, home / "study.yaml")
    often = "from training import cli, terminal; terminal.EVERY = 0.1; raise SystemExit(cli.main())"
    command = [sys.executable, "-c", often, "study", str(home / "study.yaml"), "--out", str(out)]
    command += ["--runs-at-once", str(AT_ONCE), "--launcher", "ray"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    errors, progress = home / "errors.txt", re.compile(r"\d/3 groups, [12] running: .* loss \d")
    with errors.open("w") as stream:
        child = subprocess.Popen(command, stderr=stream, start_new_session=True, env=plain)
    try:
        wait_for(lambda: worker_of(out, "group_000") and progress.search(errors.read_text()))
        os.killpg(child.pid, signal.SIGINT)  # as the terminal does
        child.wait(timeout=60)
    finally:
        child.kill()
        child.wait()
    said = errors.read_text()
    assert child.returncode == 130
    assert f"stopped; go on with: tiny-onn study --resume --out {out}" in said
    wait_for(lambda: not processes_of(child.pid), 20)
    run_study(study, out, resume=True)
    assert_same_study(out, local)


# Mistakes -------------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of a command line that is refused."""
    assert main(["study", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_without_ray_one_line_says_what_to_install(
    study: StudyConfig, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_study(study, home / "study.yaml")
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused(capsys, str(home / "study.yaml"), "--out", str(home / "none"), "--launcher", "ray")
    assert "pip install 'tiny-onn-func[cluster]'" in said
    assert not (home / "none").exists()


@needs_ray
def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise Exception("a long story\nThe current node timed out during startup.")

    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(UserError, match=r"^--launcher ray: expected Ray to start, got: The current node timed out"),
        session(None),
    ):
        pass


def test_an_address_without_ray_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--address: expected --launcher ray" in refused(capsys, "study.yaml", "--address", "auto")


@needs_ray
@pytest.mark.parametrize(
    ("address", "message"),
    {
        "127.0.0.1:1": "expected a Ray head at 127.0.0.1:1, got: .*refused",
        "nowhere.invalid:6379": "expected a Ray head at nowhere.invalid:6379",
        "127.0.0.1:99999": "expected a Ray head at 127.0.0.1:99999",
        "head": "expected HOST:PORT of a Ray head, or auto, got 'head'",
        "ray://127.0.0.1:10001": "expected HOST:PORT",
    }.items(),
)
def test_an_address_where_nobody_is_is_refused_before_anything_is_written(
    address: str, message: str, home: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests have connected
    save_study(study, home / "study.yaml")
    flags = (str(home / "study.yaml"), "--out", str(home / "none"), "--launcher", "ray", "--address", address)
    start = time.monotonic()
    assert re.search(message, refused(capsys, *flags))
    assert time.monotonic() - start < 30
    assert not (home / "none").exists()


def test_a_group_asks_for_a_gpu_where_it_computes_on_one() -> None:
    assert [gpus_of(*case) for case in (("cpu", 4), ("auto", 0), ("auto", 2), ("cuda", 1))] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="no node of the Ray cluster has a GPU, got cuda"):
        gpus_of("cuda", 0)
    with pytest.raises(UserError, match="chooses the GPU of each group, got cuda:1"):
        gpus_of("cuda:1", 2)


@needs_ray
def test_a_port_of_something_else_is_refused_in_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.study.ray.session.REHEARSE", 3.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"expected Ray at {address}, which did not answer as one within 3 s"):
            _check_address(address)


def test_a_node_with_another_version_another_folder_or_no_working_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text("process 1 on head\n")
    folder, holder, cwd = str(tmp_path), "process 1 on head\n", str(tmp_path)
    assert check_place(folder, holder, cwd, versions()) is None
    other = check_place(folder, holder, cwd, versions() | {"torch": "1.0"})
    assert "expected torch 1.0 as on the driver, got 2" in (other or "")
    for missing in ((str(tmp_path / "x"), holder), (folder, "process 2 on head\n")):
        assert "put --out on a shared file system" in (check_place(*missing, cwd, versions()) or "")
    assert "start the study from a folder" in (check_place(folder, holder, str(tmp_path / "x"), versions()) or "")


@needs_ray
def test_what_is_wrong_with_a_node_or_a_group_is_one_line(
    ray: Any, study: StudyConfig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.study.ray.launcher.versions", lambda: versions() | {"torch": "9"})
        with pytest.raises(UserError, match=r"node .*: expected torch 9 as on the driver"):
            run_study(study, home / "none", launcher=ray_launcher())
    assert not (home / "none").exists()
    monkeypatch.setattr("training.study.ray.launcher.memory_of_a_run", lambda _: 1 << 38)
    with pytest.raises(UserError, match=r"group_000: expected a node with 768\.5 GiB"):
        run_study(study, home / "large", runs_at_once=AT_ONCE, launcher=ray_launcher())
