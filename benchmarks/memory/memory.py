"""Peak memory of a hyper step, next to a plain step of Qwen3-MoE: what a process grows by, each in one of its own.

    python -m benchmarks.memory.memory [--sizes A B] [--steps N] [--json FILE]

Peak resident memory after the steps, less what the process held before its model was made, as the kernel counts it.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch

SUBJECTS = ("gradients without hooks", "gradients and surprise", "hyper step", "plain step of transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["A", "B"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--only", choices=SUBJECTS, help="print the growth of this process in MiB (used by itself)")
    args = parser.parse_args()
    if args.only:
        print(grown(args.only, args.sizes[0], args.steps))
        return
    results = {size: {subject: in_a_process(subject, size, args.steps) for subject in SUBJECTS} for size in args.sizes}
    for size, growth in results.items():
        plain = growth[SUBJECTS[-1]]
        print(f"**Size {size}**\n\n| what | MiB | against {SUBJECTS[-1]} |\n|---|---|---|")
        for subject, mebibytes in growth.items():
            print(f"| {subject} | {mebibytes:.0f} | {mebibytes / plain:.2f} |")
        print()
    if args.json:
        Path(args.json).write_text(json.dumps({"mebibytes": results}, indent=2) + "\n", encoding="utf-8")


def in_a_process(subject: str, size: str, steps: int) -> float:
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory.memory",
        "--only",
        subject,
        "--sizes",
        size,
        "--steps",
        str(steps),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def grown(subject: str, size: str, steps: int) -> float:
    """MiB by which the peak of this process rises above what it holds when all is imported and warm."""
    from benchmarks.models import SIZES
    from benchmarks.speed.step import ours, peer

    torch.set_num_threads(1)
    torch.randn(64, 64, requires_grad=True).square().sum().backward()  # the library's own buffers
    make = peer if subject == SUBJECTS[-1] else ours
    make(*SIZES[size])  # imports, and freed again
    before = held()
    step = make(*SIZES[size])[subject]
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def held() -> float:
    """MiB resident now."""
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    main()
