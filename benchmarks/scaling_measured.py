"""The simulator against this machine: bytes sent, memory and step time of 1, 2 and 4 processes, predicted and measured.

    python -m benchmarks.scaling --measure [--json FILE]

Every run is `tiny-onn train` under torchrun with gloo, one thread a process, the same batch cut into as many parts.
FLOP/s are those of the run of one process, shared out where processes are more than cores; bandwidth and latency are
those of gloo's sum between two processes. So the times of several processes are predicted, that of one is not.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.scaling_plan import Cluster, Layout, bytes_sent, flops_of, plan
from benchmarks.timing import machine
from tiny_onn_func import ModelConfig
from training.errors import UserError
from training.recorder import read_history

MODEL = ModelConfig(257, 256, 4, 4, 2, 64, 128, 32, num_experts_per_tok=4)
TINY = ModelConfig(257, 8, 1, 1, 1, 8, 8, 4, num_experts_per_tok=1)  # what a process holds beside its model
SEQUENCES, LENGTH, STEPS = 8, 64, 6
CASES = (
    (1, Layout()), (2, Layout()), (4, Layout()), (4, Layout(1, True)), (2, Layout(2)), (4, Layout(2, True)),
)  # fmt: skip
LINK_BYTES = 32 << 20
MOMENTS = 4  # gathered in the end, in messages as large as those of a step's parameters


class Found(NamedTuple):
    """What one run showed."""

    seconds: float  # of a step, median
    memory: int  # bytes of its largest process
    sent: float  # bytes of the first process in a step


def measured() -> dict[str, Any]:
    """Print predictions beside measurements; the figures as plain values."""
    torch.set_num_threads(1)
    about, (bandwidth, latency) = machine(), link()
    print(f"{about}; gloo between two processes: {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us\n")
    idle = {size: run(TINY, size, Layout()).memory for size in {size for size, _ in CASES}}
    found = {case: run(MODEL, *case) for case in CASES}
    one = flops_of(MODEL, SEQUENCES * LENGTH, LENGTH) / found[CASES[0]].seconds
    print(f"one process: {one / 1e9:.2f} GFLOP/s\n")
    print("| processes | layout | sent, MB | memory, MiB | step, ms |\n|---|---|---|---|---|")
    rows = []
    for (size, layout), seen in found.items():
        cores = min(size, os.cpu_count() or 1)
        here = Cluster(
            gpus_per_node=size, tflops=one * cores / size / 1e12, utilisation=1.0, memory_gb_s=1e6,
            intra_gb_s=bandwidth / 1e9, inter_gb_s=bandwidth / 1e9, latency_us=latency * 1e6,
        )  # fmt: skip
        guess = plan(MODEL, here, layout, size, sequences=SEQUENCES // size, length=LENGTH, width=4)
        grown = seen.memory - idle[size]
        pairs = (
            (guess.sent / 1e6, seen.sent / 1e6), (guess.memory.peak / 2**20, grown / 2**20),
            (guess.seconds * 1e3, seen.seconds * 1e3),
        )  # fmt: skip
        print(f"| {size} | {layout.name} | " + " | ".join(compared(*pair) for pair in pairs) + " |", flush=True)
        by_purpose = bytes_sent(MODEL, layout, size, SEQUENCES * LENGTH // size, 4)
        rows.append({"processes": size, "layout": layout.name, "predicted": [a for a, _ in pairs]})
        rows[-1] |= {"measured": [b for _, b in pairs], "predicted_by_purpose": by_purpose}
    return {"machine": about, "bytes_per_second": bandwidth, "latency": latency, "flops": one, "rows": rows}


def compared(guess: float, seen: float) -> str:
    error = f" ({guess / seen - 1:+.0%})" if seen else ""
    return f"{guess:.1f} for {seen:.1f}{error}"


def run(model: ModelConfig, size: int, layout: Layout) -> Found:
    """A training run of so many processes, in a folder of its own that is removed again."""
    sizes = [f"--model.{key.replace('_', '-')}={value}" for key, value in given(model).items()]
    quiet = [f"--{key}=0" for key in ("eval-every", "picture-every", "sample-tokens", "checkpoint-every")]
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "--out", f"{folder}/run", f"--steps={STEPS}", f"--batch-size={SEQUENCES}", "--threads=1"]
        command += [f"--sequence-length={LENGTH}", "--final-eval-bytes=64", *sizes, *quiet]
        command += [f"--shard-experts={layout.experts}", f"--shard-optimizer={layout.shard_optimizer}"]
        largest = spawn(size, ["-m", "training", *command])[1]
        records = read_history(f"{folder}/run")
        summary = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
    times = [record["seconds"] for record in records]
    steps = [after - before for before, after in pairwise(times[1:])]  # the first one warms up
    return Found(statistics.median(steps), largest, _in_steps(summary["bytes_sent_per_step"]))


def _in_steps(sent: dict[str, float]) -> float:
    """Bytes of a step, without those of the end: whole states, and the moments of both of them as parameters."""
    steps = {purpose: nbytes for purpose, nbytes in sent.items() if purpose != "whole state"}
    return sum(steps.values()) - steps.get("parameters", 0.0) * MOMENTS / (STEPS + MOMENTS)


def given(model: ModelConfig) -> dict[str, int]:
    """The sizes that the command line is told."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    )  # fmt: skip
    return {name: getattr(model, name) for name in names}


def spawn(size: int, arguments: list[str]) -> tuple[str, int]:
    """(what it printed, bytes of its largest process) of a program under torchrun, or alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *(torchrun if size > 1 else []), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            last = [line for line in err.read().splitlines() if line.strip()][-1:]
            raise UserError(f"{' '.join(command)}: expected it to end well, got: {' '.join(last)}")
        return out.read(), usage.ru_maxrss * 1024


def link() -> tuple[float, float]:
    """(bytes/s, seconds a message) of gloo's sum between two processes of this machine."""
    printed = spawn(2, ["-m", "benchmarks.scaling_measured"])[0]
    bandwidth, latency = json.loads(printed.strip().splitlines()[-1])
    return bandwidth, latency


def _link() -> None:
    """One of the two processes: sums of many bytes and of few; a sum of n bytes sends n, in 2 messages."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    times = {}
    for nbytes in (4, LINK_BYTES):
        vector, rounds = torch.zeros(nbytes // 4), []
        for _ in range(7):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(vector)
            rounds.append(time.perf_counter() - start)
        times[nbytes] = statistics.median(rounds)
    if dist.get_rank() == 0:
        print(json.dumps([LINK_BYTES / (times[LINK_BYTES] - times[4]), times[4] / 2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    _link()
