"""Bad setups of many processes end all of them soon, with one line that names the cause, and status 2.

Threads meet as processes do, in less time; the slow tests are whole processes, as a launcher would start them.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.training.distributed.processes import ROOT, ended, free_port
from tiny_onn_func.config import ModelConfig
from training.distributed import rendezvous
from training.distributed.rendezvous import PATIENCE, RankInfo, Rendezvous, ReportedByAnotherRank, join_rendezvous
from training.errors import UserError
from training.run.config import RunConfig
from training.run.launch import check_sizes
from training.step.hyper_params import HyperParams

SOON = 30.0  # seconds


def meeting_of(places: list[RankInfo], facts: list) -> list:
    """What becomes of each: where all met, or the error."""
    ends: list = [None] * len(places)

    def join(number: int) -> None:
        try:
            ends[number] = join_rendezvous(places[number], facts[number], time.monotonic())
        except UserError as error:
            ends[number] = error

    threads = [threading.Thread(target=join, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return ends


def places(size: int, port: int, restarts: int = 0) -> list[RankInfo]:
    return [RankInfo(rank, size, rank, "127.0.0.1", port, False, restarts * rank) for rank in range(size)]


def messages(ends: list) -> list[str]:
    """The one text that somebody says."""
    assert all(isinstance(end, UserError) for end in ends), ends
    return [str(end) for end in ends if not isinstance(end, ReportedByAnotherRank)]


def test_all_meet_in_one_store_and_know_of_the_restarts() -> None:
    ends = meeting_of(places(3, free_port(), restarts=2), [{"seed": 1}] * 3)
    assert all(isinstance(end, Rendezvous) for end in ends), ends
    ends[0].store.set("word", "here")
    assert ends[2].store.get("word") == b"here"
    assert [end.restarts for end in ends] == [4, 4, 4]


def test_notes_of_an_earlier_round_disturb_nobody() -> None:
    """The store of torchrun's agent outlives the processes: those that were killed have left their notes in it."""
    port = free_port()
    store = rendezvous.dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    hosted = [rank_info._replace(hosted=True) for rank_info in places(2, port)]
    for attempt in range(3):
        ends = meeting_of(hosted, [{"seed": attempt}] * 2)
        assert all(isinstance(end, Rendezvous) for end in ends), ends
    store.delete_key("note/1")
    store.set("note/1", '{"nonce": "of a dead one", "restarts": 0, "wrong": "nothing that matters now"}')
    assert all(isinstance(end, Rendezvous) for end in meeting_of(hosted, [{"seed": 9}] * 2))


def test_who_differs_is_named_by_one() -> None:
    facts = [{"seed": 1, "steps": 2}, {"seed": 1, "steps": 2}, {"seed": 1, "steps": 3}]
    (text,) = messages(meeting_of(places(3, free_port()), facts))
    assert text.startswith("steps: expected 2, as on rank 0, on every rank, got 3 on rank 2; start all with the same")


def test_a_mistake_of_one_is_said_by_it_alone() -> None:
    ends = meeting_of(places(2, free_port()), [{"seed": 1}, UserError("--steps: expected a whole number")])
    assert messages(ends) == ["--steps: expected a whole number"]
    assert str(ends[1]) == "--steps: expected a whole number"


def test_who_is_missing_is_named_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 1.0)
    (text,) = messages(meeting_of(places(3, free_port())[:2], [{"seed": 1}] * 2))
    assert "expected 3 processes within 1 s, got none of rank 2; start all of them with the same command" in text


def test_a_port_in_use_and_an_address_out_of_reach_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 1.0)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        (text,) = messages(meeting_of(places(2, port)[:1], [{}]))
    assert text.startswith(
        f"127.0.0.1:{port}: expected to listen there, got: Address already in use; choose another port"
    )
    (text,) = messages(meeting_of(places(2, port := free_port())[1:], [{}]))
    assert text.startswith(f"127.0.0.1:{port}: expected to meet the others there, got: Connection refused;")


REFUSED = {
    "batch_size": (RunConfig(batch_size=3), "a multiple of the processes (2), got 3"),
    "shard_experts": (RunConfig(shard_experts=3), "a divisor of the processes (2), got 3"),
    "model.num_experts": (
        RunConfig(shard_experts=2, model=ModelConfig(257, 8, 1, 2, 1, 4, 8, 5)),
        "a multiple of shard_experts (2), got 5",
    ),
    "compile": (RunConfig(compile=True), "false on several processes, got True"),
    "hyper.expert_norm": (RunConfig(hyper=HyperParams(expert_norm=1.0)), "0 on several processes, got 1.0"),
    "hyper.shuffle_targets": (RunConfig(hyper=HyperParams(shuffle_targets=1.0)), "0 on several processes, got 1.0"),
    "surprise_kind": (RunConfig(surprise_kind="oracle"), "no oracle on several processes, got oracle"),
    "hyper.regenerate_below": (
        RunConfig(shard_optimizer=True, hyper=HyperParams(regenerate_below=0.1)),
        "0 with shard_optimizer or shard_experts, got 0.1",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_many_processes_cannot_do_is_refused_by_its_key(key: str) -> None:
    config, wanted = REFUSED[key]
    with pytest.raises(UserError) as caught:
        check_sizes(config, 2)
    assert str(caught.value).startswith(f"{key}: expected {wanted};")
    if not key.startswith(("shard", "model")):
        check_sizes(config, 1)  # one process can


# Whole processes ------------------------------------------------------------------------------------------------------


def start(rank: int, size: int, port: int, folder: Path, *flags: str, **variables: str) -> "subprocess.Popen[str]":
    """A process as a launcher would start it, without torchrun's own messages."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TINY_ONN_CACHE": str(folder / "cache"),
    } | variables  # fmt: skip
    data = folder / "text.txt"
    data.write_text("the router sends each token to the expert that it surprises least.\n" * 60, encoding="utf-8")
    command = [sys.executable, "-m", "training", "train", "--data", str(data), "--out", str(folder / "run"), *flags]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines_of(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """What they say on the error stream; all of them must end soon, with status 2 and nothing on the output."""
    begun = time.monotonic()
    done = ended(processes, SOON + 30)
    seconds = time.monotonic() - begun
    assert [process.returncode for process in done] == [2] * len(done), [process.stderr for process in done]
    assert all(process.stdout == "" for process in done)
    assert seconds < SOON + 5, f"{seconds:.0f} s"  # starting Python counts here, and the machine may be busy
    return [line for process in done for line in process.stderr.splitlines()]


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 2, port, tmp_path, "--batch-size", "3") for rank in range(2)])
    assert line.startswith("tiny-onn: batch_size: expected a multiple of the processes (2), got 3")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_experts_that_do_not_divide_are_named_once(tmp_path: Path) -> None:
    port, flags = free_port(), ("--shard-experts", "2", "--model.num-experts", "5")
    (line,) = lines_of([start(rank, 2, port, tmp_path, *flags) for rank in range(2)])
    assert "model.num_experts: expected a multiple of shard_experts (2), got 5" in line


@pytest.mark.slow
def test_another_setting_on_a_rank_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 2, port, tmp_path, "--seed", str(rank)) for rank in range(2)])
    assert "seed: expected 0, as on rank 0, on every rank, got 1 on rank 1" in line


@pytest.mark.slow
def test_a_mistake_on_a_command_line_is_said_by_its_rank_alone(tmp_path: Path) -> None:
    port = free_port()
    flags = [("--steps", "3"), ("--steps", "many")]
    (line,) = lines_of([start(rank, 2, port, tmp_path, *flags[rank]) for rank in range(2)])
    assert "--steps" in line


@pytest.mark.slow
def test_another_version_on_a_rank_is_named_once(tmp_path: Path) -> None:
    """A copy of the program in which one byte differs."""
    other = tmp_path / "other"
    for package in ("tiny_onn_func", "training"):
        target = other / package
        target.mkdir(parents=True)
        for path in (ROOT / package).glob("*.py"):
            (target / path.name).write_bytes(path.read_bytes())
    with (other / "training" / "errors.py").open("a") as file:
        file.write("\n")
    port = free_port()
    places = ({}, {"PYTHONPATH": str(other)})
    (line,) = lines_of([start(rank, 2, port, tmp_path, **places[rank]) for rank in range(2)])
    assert "the program's files: expected " in line
    assert "on rank 1" in line


@pytest.mark.slow
def test_a_missing_rank_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 3, port, tmp_path) for rank in range(2)])
    assert f"expected 3 processes within {PATIENCE:.0f} s, got none of rank 2" in line


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        (line,) = lines_of([start(0, 2, port, tmp_path)])
    assert f"127.0.0.1:{port}: expected to listen there, got: Address already in use" in line


@pytest.mark.slow
def test_an_address_out_of_reach_is_named(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(1, 2, port, tmp_path)])
    assert f"127.0.0.1:{port}: expected to meet the others there, got: Connection refused" in line


@pytest.mark.slow
def test_a_name_of_no_machine_is_named(tmp_path: Path) -> None:
    (line,) = lines_of([start(1, 2, free_port(), tmp_path, MASTER_ADDR="nowhere.invalid")])
    assert line.startswith("tiny-onn: nowhere.invalid:")


@pytest.mark.parametrize("flags", [("--shard-experts", "2"), ("--shard-experts", "0")])
def test_one_process_refuses_to_be_two(tmp_path: Path, flags: tuple[str, ...]) -> None:
    from training.cli import main

    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    assert not (tmp_path / "run").exists()
