"""Side by side: interleaved repetitions in one process, medians and spread, a table and a JSON file."""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.run.process import disable_heap_trimming


def arguments(doc: str | None, repetitions: int, sizes: Sequence[str] = (), chosen: Sequence[str] = ()) -> Any:
    """Flags that benchmarks share, acted on: threads set, memory kept, the machine printed.

    Args:
        doc: what `--help` says.
        repetitions: rounds by default.
        sizes: names that `--sizes` takes; without any there is no such flag.
        chosen: those by default; all.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sizes:
        parser.add_argument("--sizes", nargs="+", default=list(chosen or sizes), choices=list(sizes))
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    disable_heap_trimming()
    torch.set_num_threads(args.threads)
    print(machine())
    return args


class Timing(NamedTuple):
    median: float  # milliseconds
    low: float  # first quartile
    high: float  # third quartile
    rounds: tuple[float, ...]  # every repetition


def interleaved(subjects: Mapping[str, Callable[[], object]], repetitions: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time every subject once a round, so that a noisy moment meets all of them."""
    for _ in range(warm_up):
        for subject in subjects.values():
            subject()
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    gc.disable()
    for _ in range(repetitions):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject()
            samples[name].append((time.perf_counter() - start) * 1e3)
        gc.collect()
    gc.enable()
    return {name: _summary(times) for name, times in samples.items()}


def ratio(timings: Mapping[str, Timing], name: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of one subject's time over another's in the same round: both met the same noise."""
    pairs = zip(timings[name].rounds, timings[to].rounds, strict=True)
    low, median, high = _quartiles([ours / theirs for ours, theirs in pairs])
    return median, low, high


def table(title: str, timings: Mapping[str, Timing], to: str) -> str:
    """A Markdown table: milliseconds, ratio round by round, quartiles of both."""
    lines = [f"**{title}**", "", f"| what | ms | quartiles | against {to} | quartiles |", "|---|---|---|---|---|"]
    for name, timing in timings.items():
        median, low, high = ratio(timings, name, to)
        took = f"{timing.median:.1f} | {timing.low:.1f} to {timing.high:.1f}"
        lines.append(f"| {name} | {took} | {median:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, object]:
    """Facts of the machine that give figures their meaning; a matmul of 1024 measures its speed at the moment."""
    x = torch.randn(1024, 1024)
    product = interleaved({"matmul": lambda: x @ x}, 5)["matmul"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "float32_matmul_gflops": round(2 * 1024**3 / product.median / 1e6, 1),
    }


def write_json(path: str, results: Mapping[str, Mapping[str, Timing]]) -> None:
    """All timings with the machine they were made on."""
    milliseconds = {
        title: {name: timing._asdict() for name, timing in timings.items()} for title, timings in results.items()
    }
    Path(path).write_text(
        json.dumps({"machine": machine(), "milliseconds": milliseconds}, indent=2) + "\n", encoding="utf-8"
    )


def _summary(times: list[float]) -> Timing:
    low, median, high = _quartiles(times)
    return Timing(median, low, high, tuple(times))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, median, high
