"""torchrun's runs: killed workers come back, and what comes out is bit for bit what comes out without kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import assert_same_bits
from tests.processes import ROOT, ended, free_port
from tests.test_engine import SMALL
from training.checkpoint import load_checkpoint
from training.cli import main

RUN = [*SMALL, "--batch-size=4", "--model.num-hidden-layers=2", "--eval-every=0", "--checkpoint-every=5"]


def torchrun(folder: Path, name: str, *flags: str, workers: int = 2, options: tuple[str, ...] = ()):
    """A started torchrun; `options` are its own."""
    data = folder / "text.txt"
    data.write_text("the router sends each token to the expert that it surprises least.\n" * 60, encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TINY_ONN_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}", *options, "-m", "training"]
    command += ["train", f"--data={data}", f"--out={folder / name}", *RUN, *flags]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(*begun: "subprocess.Popen[str]") -> str:
    """What they said, of torchrun's restarts too; all must end well."""
    done = ended(list(begun), 400)
    assert all(process.returncode == 0 for process in done), "\n".join(p.stderr[-4000:] for p in done)
    return "".join(process.stderr for process in done)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """Processes that torchrun has begun, in the order of their ranks."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"training" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def kill_one(run: Path, agents: "list[subprocess.Popen[str]]", after: int, chance: random.Random) -> None:
    """Kill a worker, whichever, once the run has recorded so many steps."""
    end = time.monotonic() + 300
    while steps_done(run) < after:
        assert time.monotonic() < end, f"no {after} steps in {run}: {os.listdir(run) if run.exists() else 'nothing'}"
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents]
        time.sleep(0.01)
    time.sleep(chance.random() * 0.1)
    pids = [pid for agent in agents for pid in workers_of(agent)]
    os.kill(chance.choice(pids), signal.SIGKILL)


def assert_whole_record(run: Path, steps: int) -> None:
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_killed_worker_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one of them killed at a random moment; the run goes on from a checkpoint with the same batches.

    And it is the run of one process, as far as float32 goes.
    """
    whole = torchrun(tmp_path, "whole", "--steps=40")
    killed = torchrun(tmp_path, "killed", "--steps=40", options=("--max-restarts=3",))
    kill_one(tmp_path / "killed", [killed], 7, random.Random(0))
    finished(whole)
    assert "exitcode: -9" in finished(killed), "the kill came too late"
    assert_same_bits(load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "whole"))
    assert_whole_record(tmp_path / "killed", 40)
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    alone = tmp_path / "alone"
    assert main(["train", f"--data={tmp_path / 'text.txt'}", f"--out={alone}", *RUN, "--steps=40"]) == 0
    losses, wanted = ([record["main_loss"] for record in records(run)] for run in (tmp_path / "whole", alone))
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("workers", "kills", "flags"),
    [(4, 3, ()), (2, 1, ("--shard-optimizer=true",)), (2, 1, ("--shard-experts=2", "--shard-optimizer=true"))],
    ids=["data", "optimizer", "both"],
)
def test_kills_at_random_moments_change_no_bit(
    tmp_path: Path, seed: int, workers: int, kills: int, flags: tuple[str, ...]
) -> None:
    chance = random.Random(seed)
    whole = torchrun(tmp_path, "whole", "--steps=60", *flags, workers=workers)
    killed = torchrun(tmp_path, "killed", "--steps=60", *flags, workers=workers, options=("--max-restarts=9",))
    for after in sorted(chance.sample(range(1, 50), kills)):
        kill_one(tmp_path / "killed", [killed], after, chance)
    assert "exitcode: -9" in finished(whole, killed), "no kill came in time"
    assert_same_bits(load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "whole"))
    assert_whole_record(tmp_path / "killed", 60)


@pytest.mark.slow
def test_two_nodes_are_two_agents(tmp_path: Path) -> None:
    """Two rendezvous agents with a worker each; one after the other is killed."""
    finished(torchrun(tmp_path, "whole", "--steps=40"))
    port, chance = free_port(), random.Random(1)
    options = (
        "--nnodes=2", "--max-restarts=6", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=7", "--local-addr=127.0.0.1",
    )  # fmt: skip
    agents = [torchrun(tmp_path, "killed", "--steps=40", workers=1, options=options) for _ in range(2)]
    for after in (6, 22):
        kill_one(tmp_path / "killed", agents, after, chance)
    assert "exitcode: -9" in finished(*agents), "no kill came in time"
    assert_same_bits(load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "whole"))
    assert_whole_record(tmp_path / "killed", 40)
