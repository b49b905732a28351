"""Stability of a long run: memory, speed and folder of 20,000 small steps in a process of its own.

    python -m benchmarks.memory.long_run [--steps N] [--data SPEC] [--out DIR] [--json FILE]

Checkpoints every 500 steps, a score every 100, pictures every 2,000, as the default run has them but for their sizes.
The slope of memory is the line of least squares through the samples of the second half. Speed is told twice: in
seconds on the clock, which a busy machine stretches, and in seconds of the processor, where the last 1,000 steps are
held against the first 1,000 of the second half.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.timing import machine

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1,
    "moe_intermediate_size": 8, "num_experts": 4,
}  # fmt: skip
FLAGS = {
    "batch_size": 2, "sequence_length": 16, "checkpoint_every": 500, "eval_every": 100, "eval_bytes": 1000,
    "final_eval_bytes": 1000, "picture_every": 2000, "sample_tokens": 0, "threads": 1,
}  # fmt: skip
EVERY = 0.5  # seconds between two samples
SPAN = 1000  # steps whose processor time is compared


class Sample(NamedTuple):
    """One sample of the process."""

    step: int
    memory: int  # bytes, resident
    busy: float  # seconds of the processor since its begin, all threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--data", default="stdlib:email/*.py")
    parser.add_argument("--out", help="where the run is made; by default in a folder that goes in the end")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or f"{folder}/run")
        samples = watched(command(args.steps, args.data, out), out)
        figures = {**machine(), **memory(samples), **effort(samples), **speed(out), **disk(out, args.steps)}
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def command(steps: int, data: str, out: Path) -> list[str]:
    values = FLAGS | {f"model.{key}": value for key, value in SIZES.items()}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "training", "train", f"--data={data}", f"--out={out}", f"--steps={steps}", *flags]


def watched(argv: list[str], out: Path) -> list[Sample]:
    """Run a command, and sample the memory and processor time of its process until it ends."""
    samples = []
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        run = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(EVERY)
            step = last_step(out / "metrics.jsonl")
            try:
                resident, times = run.memory_info().rss, run.cpu_times()
            except psutil.NoSuchProcess:
                continue
            if step and resident:
                samples.append(Sample(step, resident, times.user + times.system))
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    return samples


def last_step(path: Path) -> int:
    """Step of the last whole record; 0 before there is one."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(-min(8192, path.stat().st_size), os.SEEK_END)
        lines = file.read().rsplit(b"\n", 2)
    return int(json.loads(lines[-2])["step"]) if len(lines) == 3 else 0


def memory(samples: list[Sample]) -> dict[str, object]:
    steps, sizes, _ = np.array(samples, dtype=float).T
    sizes /= 1e6
    late = steps > steps[-1] / 2
    slope = np.polyfit(steps[late], sizes[late], 1)[0] * 1000
    return {
        "samples": len(samples),
        "memory, MB at the begin, at half, at the end": [round(float(sizes[at]), 1) for at in (0, late.argmax(), -1)],
        "memory, slope over the second half, MB per 1,000 steps": round(float(slope), 3),
    }


def effort(samples: list[Sample]) -> dict[str, object]:
    """Milliseconds of the processor a step, by quarters, and of the last SPAN steps against the first of the half."""
    steps, _, busy = np.array(samples, dtype=float).T

    def each(begin: float, end: float) -> float:
        first, last = np.interp([begin, end], steps, busy)
        return float((last - first) / (end - begin) * 1e3)

    marks, half, end = np.linspace(steps[0], steps[-1], 5), steps[-1] / 2, steps[-1]
    early, late = each(half, half + SPAN), each(end - SPAN, end)
    return {
        "processor, ms a step, by quarters": [round(each(a, b), 2) for a, b in pairwise(marks)],
        "processor, ms a step, first and last 1,000 of the second half": [round(early, 2), round(late, 2)],
        "processor, the last against the first": round(late / early, 3),
    }


def speed(out: Path) -> dict[str, object]:
    """Median milliseconds of a step in each quarter."""
    lines = (out / "metrics.jsonl").read_text(encoding="ascii").splitlines()
    seconds = [0.0, *(json.loads(line)["seconds"] for line in lines)]
    quarter = len(lines) // 4
    spans = [range(start, start + quarter - 99, 100) for start in range(0, 4 * quarter, quarter)]
    each = [median((seconds[at + 100] - seconds[at]) * 10 for at in span) for span in spans]  # ms a step of a hundred
    return {"clock, ms a step, by quarters": [round(value, 2) for value in each], "records": len(lines)}


def disk(out: Path, steps: int) -> dict[str, object]:
    def size(pattern: str) -> int:
        return sum(path.stat().st_size for path in out.glob(pattern) if path.is_file())

    return {
        "metrics.jsonl, bytes a step": round(size("metrics.jsonl") / steps, 1),
        "TensorBoard, bytes a step": round(size("tensorboard/*") / steps, 1),
        "checkpoints": len([*out.glob("checkpoints/step_*")]),
        "all else, bytes": size("**/*") - size("metrics.jsonl") - size("tensorboard/*"),
    }


if __name__ == "__main__":
    main()
