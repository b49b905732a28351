"""Seconds that `tiny-onn watch` takes for a refresh of a large study: python -m benchmarks.speed.watch [--runs 200].

A study's folder is made up: arms with five seeds each, every run with so many records. The first page reads them all;
each later one comes after one more record of every run, and must not read the old ones again.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.storage.recorder import FILE
from training.storage.results import UNFINISHED, write_results
from training.study.config import Arm, StudyConfig, expand
from training.study.file import save_study
from training.study.report import FolderReader
from training.study.summary import empty_row

SEEDS, LAYERS, EXPERTS = 5, 4, 16


def lines(step: int, runs: int, drawn: np.random.Generator) -> Iterator[str]:
    """One record of every run."""
    for load in np.round(drawn.dirichlet(np.full(EXPERTS, 0.5), (runs, LAYERS)), 4):
        table = load.tolist()
        record = {
            "step": step, "tokens": 768 * step, "seconds": step / 10, "main_loss": 5 / step, "main_acc": 0.5,
            "gating_acc": 0.5, "gating_trivial": 0.25, "router_loss": 1.5, "surprise": 0.125, "tau": 2.5, "avg_k": 4.0,
            "max_vio": 1.5, "dead_experts": 3, "pi_score": 0.5, "expert_load": table, "target_load": table,
            "expert_surprise": table,
        }  # fmt: skip
        yield json.dumps(record, separators=(",", ":")) + "\n"


def main() -> None:
    """Make the folder, and print how long each page takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--refreshes", type=int, default=5)
    args = parser.parse_args()
    drawn = np.random.default_rng(0)
    arms = [Arm(f"arm {i}", {"hyper.router_lr": 1e-4 * (i + 1)}) for i in range(args.runs // SEEDS)]
    study = StudyConfig(name="large", arms=arms, baseline="arm 0", seeds=range(SEEDS), margin=0.02)
    with tempfile.TemporaryDirectory() as place:
        folder, runs = Path(place), expand(study)
        save_study(study, folder / "study.yaml")
        write_results([empty_row(run) | {"status": UNFINISHED} for run in runs], folder)
        files = [folder / "runs" / run.id / FILE for run in runs]
        texts = itertools.cycle(["".join(next(lines(s + 1, 1, drawn)) for s in range(args.records)) for _ in range(4)])
        for file in files:
            file.parent.mkdir(parents=True)
            file.write_text(next(texts))
        size = sum(file.stat().st_size for file in files)
        print(f"{len(runs)} runs of {args.records:,} records, {size / 2**20:,.0f} MiB", flush=True)
        reader = FolderReader(folder)
        for refresh in range(args.refreshes + 1):
            start, used = time.perf_counter(), time.process_time()
            page = reader.read()[0]
            seconds, used = time.perf_counter() - start, time.process_time() - used
            name, mebibytes = "refresh" if refresh else "first page", len(page.main) / 2**20
            print(f"{name}: {seconds:.2f} s, {used:.2f} s of the processor, {mebibytes:.1f} MiB", flush=True)
            for file, line in zip(files, lines(args.records + 1 + refresh, len(files), drawn), strict=True):
                with file.open("a") as open_file:
                    open_file.write(line)


if __name__ == "__main__":
    main()
