"""Bad setups of many processes end all of them soon, with one line that names the cause, and status 2."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, ended
from training.meeting import PATIENCE

SOON = 30.0  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def test_a_batch_that_does_not_divide_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 2, port, tmp_path, "--batch-size", "3") for rank in range(2)])
    assert line.startswith("tiny-onn: batch_size: expected a multiple of the processes (2), got 3")
    assert not (tmp_path / "run").exists()


def test_experts_that_do_not_divide_are_named_once(tmp_path: Path) -> None:
    port, flags = free_port(), ("--shard-experts", "2", "--model.num-experts", "5")
    (line,) = lines_of([start(rank, 2, port, tmp_path, *flags) for rank in range(2)])
    assert "model.num_experts: expected a multiple of shard_experts (2), got 5" in line


def test_another_setting_on_a_rank_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 2, port, tmp_path, "--seed", str(rank)) for rank in range(2)])
    assert "seed: expected 0, as on rank 0, on every rank, got 1 on rank 1" in line


def test_a_mistake_of_one_rank_is_said_by_it_alone(tmp_path: Path) -> None:
    port = free_port()
    flags = [("--steps", "3"), ("--steps", "many")]
    (line,) = lines_of([start(rank, 2, port, tmp_path, *flags[rank]) for rank in range(2)])
    assert "--steps" in line


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


def test_a_missing_rank_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 3, port, tmp_path) for rank in range(2)])
    assert f"expected 3 processes within {PATIENCE:.0f} s, got none of rank 2" in line


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        (line,) = lines_of([start(0, 2, port, tmp_path)])
    assert f"127.0.0.1:{port}: expected to listen there, got: Address already in use" in line


def test_an_address_out_of_reach_is_named(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(1, 2, port, tmp_path)])
    assert f"127.0.0.1:{port}: expected to meet the others there, got: Connection refused" in line


def test_a_name_of_no_machine_is_named(tmp_path: Path) -> None:
    (line,) = lines_of([start(1, 2, free_port(), tmp_path, MASTER_ADDR="nowhere.invalid")])
    assert line.startswith("tiny-onn: nowhere.invalid:")


def test_rules_of_one_batch_are_refused_on_many(tmp_path: Path) -> None:
    port = free_port()
    (line,) = lines_of([start(rank, 2, port, tmp_path, "--hyper.shuffle-targets", "1") for rank in range(2)])
    assert "hyper.shuffle_targets: expected 0 on several processes, got 1" in line


@pytest.mark.parametrize("flags", [("--shard-experts", "2"), ("--shard-experts", "0")])
def test_one_process_refuses_to_be_two(tmp_path: Path, flags: tuple[str, ...]) -> None:
    from training.cli import main

    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    assert not (tmp_path / "run").exists()
