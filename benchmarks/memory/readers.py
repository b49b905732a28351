"""Readers of local rows, ours beside those of the library `datasets`: seconds, memory, and what an error says.

    python -m benchmarks.memory.readers [--rows N]

Each reader runs in a process of its own over the same rows of 1,000 characters. `start` is the time to import and to
read the first row, `read` that of the other rows, MiB the growth of the peak beyond the process's size after imports.
"""

import argparse
import csv
import importlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tar": "webdataset"}


def write_files(folder: Path, count: int) -> list[Path]:
    """The same rows in four kinds of files, and lines of which the last is broken."""
    from pyarrow import Table, parquet

    noise = random.Random(0)
    texts = [noise.randbytes(500).hex() for _ in range(count)]
    paths = [folder / f"rows{suffix}" for suffix in BUILDERS]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    paths[0].write_text(lines)
    parquet.write_table(Table.from_pydict({"text": texts}), paths[1], row_group_size=5000)
    with paths[2].open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    with tarfile.open(paths[3], "w") as archive:
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{number:07}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    broken = folder / "broken.jsonl"
    broken.write_text(lines + "oops\n")
    return [*paths, broken]


def rows_of(path: Path, whose: str) -> Iterator[object]:
    """The rows of a file by one of the two."""
    if whose == "ours":
        from training.data.sources import documents, find_source

        return documents(find_source(str(path)))
    from datasets import load_dataset

    kind = BUILDERS[path.suffix]
    return iter(load_dataset(kind, data_files={"train": [str(path)]}, split="train", streaming=True))


def peak_kib() -> int:
    """Largest resident size of this process since it began; `ru_maxrss` would count its parent's."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def measure(path: Path, whose: str) -> None:
    """Print one reader's numbers as JSON."""
    begin = time.perf_counter()
    importlib.import_module("training.data.sources" if whose == "ours" else "datasets")
    before = peak_kib()
    said, first, count = "", 0.0, 0
    try:
        for _ in rows_of(path, whose):
            first, count = first or time.perf_counter() - begin, count + 1
    except Exception as error:
        said = str(error).replace(str(path), path.name)
    grown = (peak_kib() - before) >> 10
    print(json.dumps([count, first, time.perf_counter() - begin - first, grown, said]))


def main() -> None:
    """Measure each reader in its own process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "WHOSE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(Path(args.one[0]), args.one[1])
        return
    print("| file | reader | rows | start s | read s | MiB | error |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in write_files(Path(folder), args.rows):
            for whose in ("ours", "datasets"):
                command = [sys.executable, "-m", "benchmarks.memory.readers", "--one", str(path), whose]
                ended = subprocess.run(command, capture_output=True, text=True, check=True)
                count, first, rest, grown, said = json.loads(ended.stdout)
                print(
                    f"| {path.name} | {whose} | {count:,} | {first:.1f} | {rest:.1f} | {grown} | {said} |", flush=True
                )


if __name__ == "__main__":
    main()
