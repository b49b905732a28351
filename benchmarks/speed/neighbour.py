"""A step beside other programs: alone, beside a busy loop, and beside a program that computes with threads.

    python -m benchmarks.speed.neighbour [--sizes A B] [--repetitions N] [--threads N] [--json FILE]

Two processes take turns: one as `tiny-onn` runs, one with OpenMP's default of spinning while threads wait.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from benchmarks.models import SIZES
from benchmarks.timing import arguments, interleaved, table, write_json

DEFAULT = "300000"  # GOMP_SPINCOUNT that libgomp takes where nothing is said
WAITING: Mapping[str, Mapping[str, str]] = {"bounded": {}, "OpenMP's default": {"GOMP_SPINCOUNT": DEFAULT}}
NEIGHBOURS = {
    "alone": None,
    "a busy loop": "while True: pass",
    "a program with threads": "import torch; x = torch.randn(1500, 1500)\nwhile True: x @ x",
}
WORKER = """
import sys
import tiny_onn_func, torch
from benchmarks.models import SIZES, a_batch
from tiny_onn_func.kernels.runtime import divide_threads, loaded
from training import HyperParams, hyper_step, init_state
from training.run.process import disable_heap_trimming
disable_heap_trimming()
(divide_threads if loaded().has_own_threads() else torch.set_num_threads)(int(sys.argv[2]))
config, batch_size, seq = SIZES[sys.argv[1]]
state, batch = init_state(config, torch.Generator().manual_seed(0)), a_batch(config, batch_size, seq)
for line in sys.stdin:
    hyper_step(state, batch, HyperParams(balance_weight=1.0), config)
    print("done", flush=True)
"""


def main() -> None:
    args = arguments(__doc__, 21, list(SIZES), ["A"])
    results = {}
    for size in args.sizes:
        with ExitStack() as workers:
            steps = {name: workers.enter_context(worker(size, args.threads, env)) for name, env in WAITING.items()}
            for name, program in NEIGHBOURS.items():
                title = f"size {size}, {name}"
                with neighbour(program):
                    results[title] = interleaved(steps, args.repetitions)
                print(table(title, results[title], "OpenMP's default"), flush=True)
        print(f"size {size}, beside a busy loop / alone: {slower(results, size)}\n", flush=True)
    if args.json:
        write_json(args.json, results)


def slower(results: Mapping[str, Mapping[str, object]], size: str) -> str:
    """Ratio of the medians, of each way to wait."""
    beside, alone = results[f"size {size}, a busy loop"], results[f"size {size}, alone"]
    return ", ".join(f"{name} {beside[name].median / alone[name].median:.2f}" for name in WAITING)  # type: ignore[attr-defined]


@contextmanager
def worker(size: str, threads: int, environment: Mapping[str, str]) -> Iterator[Callable[[], object]]:
    """A process that makes a step whenever it is called."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, size, str(threads)], env=clean | dict(environment), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    to, back = process.stdin, process.stdout

    def step() -> object:
        to.write("go\n")
        to.flush()
        return back.readline()

    try:
        yield step
    finally:
        process.kill()
        process.wait()


@contextmanager
def neighbour(program: str | None) -> Iterator[None]:
    """A program that runs meanwhile; None for none."""
    process = None if program is None else subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
