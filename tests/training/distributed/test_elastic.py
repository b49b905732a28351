"""torchrun's runs: killed workers come back, and what comes out is bit for bit what comes out without kills."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import assert_same_bits
from tests.training.distributed.processes import ROOT, ended, free_port
from tests.training.run.test_engine import SMALL
from training.cli import main
from training.storage.checkpoint import load_checkpoint

RUN = [*SMALL, "--batch-size=4", "--model.num-hidden-layers=2", "--eval-every=0", "--checkpoint-every=5"]
FLAGS = {
    "data": (), "optimizer": ("--shard-optimizer=true",), "both": ("--shard-experts=2", "--shard-optimizer=true"),
}  # fmt: skip


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
        children = psutil.Process(process.pid).children()
        return [child.pid for child in children if any("training" in word for word in child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def kill_one(run: Path, agents: "list[subprocess.Popen[str]]", after: int, chance: random.Random) -> None:
    """Kill a worker, whichever, once the run has recorded so many steps."""
    await_steps(run, agents, after)
    time.sleep(chance.random() * 0.1)
    pids: list[int] = []
    while not pids:  # the kill before may have left none for a moment
        pids = [pid for agent in agents for pid in workers_of(agent)]
    os.kill(chance.choice(pids), signal.SIGKILL)


def await_steps(run: Path, agents: "list[subprocess.Popen[str]]", after: int) -> None:
    end = time.monotonic() + 300
    while steps_done(run) < after:
        assert time.monotonic() < end, f"no {after} steps in {run}: {os.listdir(run) if run.exists() else 'nothing'}"
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents]
        time.sleep(0.01)


def assert_whole_record(run: Path, steps: int) -> None:
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_killed_worker_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, experts and optimizer states shared out, one killed at a random moment; same batches, same bits.

    And it is the run of one process, as far as float32 goes.
    """
    killed_at_random_moments(tmp_path, "both", workers=2, kills=1, steps=24, chance=random.Random(0))
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    alone = tmp_path / "alone"
    assert main(["train", f"--data={tmp_path / 'text.txt'}", f"--out={alone}", *RUN, "--steps=24"]) == 0
    losses, wanted = ([record["main_loss"] for record in records(run)] for run in (tmp_path / "whole", alone))
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("workers", "kills", "layout"),
    [(4, 3, "data"), (2, 2, "optimizer"), (4, 2, "optimizer"), (2, 2, "both"), (4, 3, "both")],
)
def test_kills_at_random_moments_change_no_bit(
    tmp_path: Path, seed: int, workers: int, kills: int, layout: str
) -> None:
    killed_at_random_moments(tmp_path, layout, workers=workers, kills=kills, steps=40, chance=random.Random(seed))


def killed_at_random_moments(
    folder: Path, layout: str, *, workers: int, kills: int, steps: int, chance: random.Random
) -> None:
    flags = (f"--steps={steps}", *FLAGS[layout])
    whole = torchrun(folder, "whole", *flags, workers=workers)
    killed = torchrun(folder, "killed", *flags, workers=workers, options=("--max-restarts=9",))
    for after in sorted(chance.sample(range(1, steps - 10), kills)):
        kill_one(folder / "killed", [killed], after, chance)
    assert "exitcode: -9" in finished(whole, killed), "no kill came in time"
    assert_same_bits(load_checkpoint(folder / "killed"), load_checkpoint(folder / "whole"))
    assert_whole_record(folder / "killed", steps)


def test_a_sharded_run_that_is_asked_to_stop_saves_its_last_whole_step(tmp_path: Path) -> None:
    stopped(tmp_path, "both", workers=2, steps=1000, whom="torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "a worker"])
@pytest.mark.parametrize(("workers", "layout"), [(2, "optimizer"), (4, "both"), (2, "data")])
def test_a_run_that_was_asked_to_stop_goes_on_with_the_same_bits(
    tmp_path: Path, workers: int, layout: str, whom: str
) -> None:
    flags = ("--steps=60", *FLAGS[layout])
    whole = torchrun(tmp_path, "whole", *flags, workers=workers)
    stopped(tmp_path, layout, workers=workers, steps=60, whom=whom)
    finished(whole, torchrun(tmp_path, "stopped", *flags, "--resume", workers=workers))
    assert_same_bits(load_checkpoint(tmp_path / "stopped"), load_checkpoint(tmp_path / "whole"))
    assert_whole_record(tmp_path / "stopped", 60)


def stopped(folder: Path, layout: str, *, workers: int, steps: int, whom: str) -> None:
    """A run that never saved before it was stopped: torchrun ends all its workers, or one of them is told alone."""
    run, flags = folder / "stopped", (f"--steps={steps}", "--checkpoint-every=0", *FLAGS[layout])
    process = torchrun(folder, run.name, *flags, workers=workers)
    await_steps(run, [process], 4)
    if whom == "torchrun":
        process.terminate()
    else:
        os.kill(workers_of(process)[-1], signal.SIGINT)
    (done,) = ended([process])
    assert done.returncode != 0
    if whom == "torchrun" or layout != "data":  # else process 0 says that it lost the other
        assert f"stopped; go on with: torchrun ... -m training train --out {run} --resume\n" in done.stderr
    (saved,) = (int(path.name[5:]) for path in run.glob("*/step_*") if path.parent.name in ("sharded", "checkpoints"))
    assert_whole_record(run, saved)
    assert 4 <= saved < steps


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


# Slurm: stand-ins for its commands, as there is no cluster here ------------------------------------------------------

SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"
SRUN = """#!/bin/bash
"$@" & "$@" & wait -n || exit; wait -n
"""


def recipe(page: str) -> str:
    """The batch file that a page of the documentation shows."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    return script


@pytest.mark.parametrize("page", ["distributed.md", "clusters.md"])
def test_the_batch_files_for_slurm_are_valid_bash(page: str) -> None:
    done = subprocess.run(["bash", "-n"], input=recipe(page), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_batch_file_for_slurm_trains_on_two_nodes_and_goes_on_when_it_is_submitted_again(tmp_path: Path) -> None:
    """Two agents of this machine, as srun would start them; the sizes are those of a small run."""
    (tmp_path / "text.txt").write_text("what one node reads, both read.\n" * 60, encoding="utf-8")
    script = recipe("distributed.md")
    for there, here in {
        "/shared/runs/": f"{tmp_path}/", "--nproc-per-node 8": "--nproc-per-node 1 --local-addr 127.0.0.1",
        ":29500": f":{free_port()}",
        "--config small --batch-size 64": f"--data {tmp_path}/text.txt {' '.join(RUN)} $MORE",
    }.items():  # fmt: skip
        assert script.count(there) == 1
        script = script.replace(there, here)
    torchrun_of = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "torchrun": torchrun_of}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "PYTHONPATH": str(ROOT),
        "TINY_ONN_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for steps in (4, 8):
        job = subprocess.Popen(
            ["bash", "-c", script], env=env | {"MORE": f"--steps={steps}"}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        finished(job)
        assert_whole_record(tmp_path / "mine", steps)


@pytest.mark.parametrize("layout", ["both", "data"])
def test_all_processes_stop_at_a_score_that_is_no_better_and_leave_a_whole_checkpoint(
    tmp_path: Path, layout: str
) -> None:
    """Rates of 0 leave every score as it is; the rows of a process go through the model in parts."""
    flags = ("--eval-every=2", "--stop-when=2", "--hyper.lr=0", "--hyper.router-lr=0", "--accumulate=2", *FLAGS[layout])
    said = finished(torchrun(tmp_path, "run", "--steps=40", *flags))
    assert said.count("note: stopped after step 6 of 40: 2 held-out scores in a row no better than") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["stopped"]["step"], summary["best_step"]) == (6, 6, 2)
    assert int(load_checkpoint(tmp_path / "run" / "checkpoints" / "step_000006")["step"]) == 6
    assert_whole_record(tmp_path / "run", 6)
    assert (
        finished(torchrun(tmp_path, "run", "--steps=40", *flags, "--resume")).count("note: stopped after step 6 of 40")
        == 1
    )
