"""The simulator against this machine: bytes sent, memory and step time of 1, 2 and 4 processes, predicted and measured.

    python -m benchmarks.scaling.report --measure [--processes 2 4] [--json FILE]

Every process makes the hyper step of a run under torchrun with gloo, one thread each, on its rows of the same batch.
FLOP/s are those of one process, shared out where processes are more than cores; bandwidth and latency are those of
gloo's sum between two processes. So the times of several processes are predicted, that of one is not. Memory is the
most that a process holds in a step beyond what it held after a step of a tiny model.

Each step is also made with every sum waited for at once, in turn with the usual ones, which let the gradients travel
while the router's gradient is computed: what that overlap is worth.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.scaling.plan import Cluster, Layout, bytes_sent, flops_of, plan
from benchmarks.timing import interleaved, machine, ratio
from tiny_onn_func import ModelConfig
from training import Batch, hyper_step, init_state
from training.distributed.collectives import Group
from training.distributed.layout import layout_of, own_state
from training.distributed.parallel_step import parallel_step
from training.errors import UserError
from training.run.config import RunConfig, hyper_params
from training.run.process import disable_heap_trimming

MODEL = ModelConfig(257, 256, 4, 4, 2, 64, 128, 32, num_experts_per_tok=4)
TINY = ModelConfig(257, 8, 1, 1, 1, 8, 8, 4, num_experts_per_tok=1)
SEQUENCES, LENGTH, ROUNDS, WARM_UP = 8, 64, 7, 1
CASES = (
    (1, Layout()), (2, Layout()), (4, Layout()), (4, Layout(1, True)), (2, Layout(2)), (4, Layout(2, True)),
)  # fmt: skip
LINK_BYTES = 32 << 20
MMAP_THRESHOLD = -3  # glibc's number, from malloc.h
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Found(NamedTuple):
    """Measurements of one layout."""

    seconds: float  # of a step, median
    memory: int  # bytes of the process that holds most
    sent: float  # bytes of the first process in a step
    overlap: tuple[float, float, float]  # a step's time over that of one without overlap: median and quartiles


def measured(processes: Collection[int]) -> dict[str, Any]:
    """Print predictions beside measurements, of one process and of so many; the figures as plain values."""
    torch.set_num_threads(1)
    about, (bandwidth, latency) = machine(), json.loads(last_line(2, "link"))
    print(f"{about}; gloo between two processes: {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us\n")
    print("| processes | layout | sent, MB | memory, MiB | step, ms | with over without overlap |")
    print("|---|---|---|---|---|---|", flush=True)
    flops, rows = 0.0, []
    for size, layout in CASES:
        if size > 1 and size not in processes:
            continue
        actual = Found(*json.loads(last_line(size, str(layout.experts), str(int(layout.shard_optimizer)))))
        flops = flops or flops_of(MODEL, SEQUENCES * LENGTH, LENGTH) / actual.seconds
        cores = min(size, os.cpu_count() or 1)
        here = Cluster(
            gpus_per_node=size, tflops=flops * cores / size / 1e12, utilisation=1.0, memory_gb_s=1e6,
            intra_gb_s=bandwidth / 1e9, inter_gb_s=bandwidth / 1e9, latency_us=latency * 1e6,
        )  # fmt: skip
        guess = plan(MODEL, here, layout, size, sequences=SEQUENCES // size, length=LENGTH, width=4)
        pairs = (
            (guess.sent / 1e6, actual.sent / 1e6), (guess.memory.peak / 2**20, actual.memory / 2**20),
            (guess.seconds * 1e3, actual.seconds * 1e3),
        )  # fmt: skip
        middle, low, high = actual.overlap
        overlap = f"{middle:.2f} ({low:.2f} to {high:.2f})" if size > 1 else ""
        columns = " | ".join(compared(*pair) for pair in pairs)
        print(f"| {size} | {layout.name} | {columns} | {overlap} |", flush=True)
        by_purpose = bytes_sent(MODEL, layout, size, SEQUENCES * LENGTH // size, 4)
        rows.append({"processes": size, "layout": layout.name, "predicted": [a for a, _ in pairs]})
        rows[-1] |= {"measured": [b for _, b in pairs], "overlap": actual.overlap, "predicted_by_purpose": by_purpose}
    return {"machine": about, "bytes_per_second": bandwidth, "latency": latency, "flops": flops, "rows": rows}


def compared(guess: float, actual: float) -> str:
    error = f" ({guess / actual - 1:+.0%})" if actual else ""
    return f"{guess:.1f} for {actual:.1f}{error}"


def last_line(size: int, *arguments: str) -> str:
    """Run this file as `size` processes, and return the last line that the first one printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["-m", "benchmarks.scaling.measured", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = subprocess.run(command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        out.seek(0)
        err.seek(0)
        if status:
            last = [line for line in err.read().splitlines() if line.strip()][-1:]
            raise UserError(f"{' '.join(command)}: expected it to end well, got: {' '.join(last)}")
        return out.read().strip().splitlines()[-1]


# One of the processes -------------------------------------------------------------------------------------------------


class Waiting(Group):
    """Group that completes each sum when it is started, so that nothing overlaps."""

    def all_reduce_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        total = super().all_reduce_async(part, purpose)()
        return lambda: total

    def reduce_scatter_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        total = super().reduce_scatter_async(part, purpose)()
        return lambda: total


def step_of_many(experts: int, shard_optimizer: bool) -> Found:
    """Steps of a layout, with and without overlap in turn, from the same state; the same figures on all processes."""
    world = Group(dist.group.WORLD, size=dist.get_world_size(), rank=dist.get_rank())
    layout = layout_of(world, shard_optimizer, experts)
    everyone, together, alike = (Waiting(group.handle, size=group.size, rank=group.rank) for group in layout[:3])
    waiting = layout._replace(world=everyone, experts=together, replicas=alike)
    hyper = hyper_params(RunConfig(model=MODEL))
    own = SEQUENCES // world.size
    tokens = torch.randint(256, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    rows = tokens[world.rank * own : (world.rank + 1) * own]
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.ones_like(rows[:, 1:]))
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, and is not counted
    hyper_step(init_state(TINY, torch.Generator()), batch, hyper, TINY)  # what is loaded when first needed
    before = _of_status("VmRSS")
    state = own_state(init_state(MODEL, torch.Generator().manual_seed(0)), MODEL, layout)

    def step(how: Any) -> Any:
        if world.size == 1:
            return hyper_step(state, batch, hyper, MODEL)
        return parallel_step(state, batch, hyper, MODEL, how)

    for _ in range(WARM_UP):  # own tensors instead of views of the whole state
        state, _ = step(layout)
    PEAK.write_text("5", encoding="ascii")  # forget the peak so far
    for _ in range(WARM_UP):
        step(layout)
    grown = torch.tensor(_of_status("VmHWM") - before)
    disable_heap_trimming()  # as a run does
    world.sent.clear()
    timings = interleaved({"with": lambda: step(layout), "without": lambda: step(waiting)}, ROUNDS, WARM_UP)
    sent = sum(world.sent.values()) / (ROUNDS + WARM_UP)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    return Found(timings["with"].median / 1e3, int(grown), sent, ratio(timings, "with", "without"))


def link() -> tuple[float, float]:
    """(bytes/s, seconds a message) of gloo's sum between two processes: a sum of n bytes sends n, in 2 messages."""
    times = {}
    for nbytes in (4, LINK_BYTES):
        vector, rounds = torch.zeros(nbytes // 4), []
        for _ in range(9):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(vector)
            rounds.append(time.perf_counter() - start)
        times[nbytes] = median(rounds)
    return LINK_BYTES / (times[LINK_BYTES] - times[4]), times[4] / 2


def _of_status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    figures = link() if arguments == ["link"] else step_of_many(int(arguments[0]), arguments[1] == "1")
    if dist.get_rank() == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1:])
