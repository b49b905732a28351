"""What the faults are put on: the command line in a process of its own, and three folders that it writes.

A subject is a command, what resumes it, the folder whose calls are spoilt, and what must be the same in the end.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.storage.plain_yaml import write_yaml

TEXT = "the router sends each token to the expert that it surprises least.\n" * 40
SIZES = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4, "num_key_value_heads": 1,
    "moe_intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
RUN = {
    "steps": 6, "batch_size": 2, "sequence_length": 16, "checkpoint_every": 2, "eval_every": 3, "eval_bytes": 60,
    "final_eval_bytes": 60, "sample_tokens": 0, "picture_every": 0, "threads": 1,
}  # fmt: skip
VOLATILE = {"seconds", "train_seconds", "tokens_per_second"}
LEFTOVERS = (".tmp", ".draft-", ".lock")


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # negative: the signal
    said: str  # its error stream
    seconds: float


class Subject(NamedTuple):
    """What is made to fail."""

    name: str
    fresh: list[str]
    again: list[str]
    out: Path
    begun: str  # the file whose presence says that --resume is right
    disk: Path  # the calls below it are spoilt; it is there before, and holds nothing else

    def wipe(self) -> None:
        for folder in {self.out, self.disk}:
            shutil.rmtree(folder, ignore_errors=True)
        self.disk.mkdir(parents=True)

    def start(self, **how: Any) -> Ended:
        """Begin, or go on where that is right."""
        begun = (self.out / self.begun).exists()
        return run_child(self.again if begun else self.fresh, self.disk, **how)

    def resumed(self, want: dict[str, Any]) -> list[str]:
        """Go on until the end; what is wrong then."""
        ended = self.start()
        if ended.status != 0:
            return [f"resume ended with {ended.status}: {ended.said.strip().splitlines()[-1:]}"]
        have = self.result()
        return [name for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]

    def result(self) -> dict[str, Any]:
        """Everything that must be the same; of a run the newest checkpoint, the older ones whole."""
        files: dict[str, Any] = {}
        for path in sorted(self.out.rglob("*")):
            name = str(path.relative_to(self.out))
            if any(mark in name for mark in LEFTOVERS):
                files[name] = "left over"
            elif path.name == "metrics.jsonl":
                files[name] = [_lasting(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            elif path.name == "summary.json":
                files[name] = _lasting(json.loads(path.read_text(encoding="utf-8")))
            elif path.name == "state.safetensors":
                files[name] = path.read_bytes()
                files |= _damage(path.parent)
        newest = max((name for name in files if "checkpoints/" in name and isinstance(files[name], bytes)), default="")
        single = self.begun == "config.yaml"
        return {
            name: value for name, value in files.items() if not single or name == newest or not isinstance(value, bytes)
        }


def _damage(folder: Path) -> dict[str, str]:
    """A checkpoint that is not whole, which no fault may leave."""
    from training.errors import UserError
    from training.storage.checkpoint_files import read_meta

    try:
        read_meta(folder)
    except UserError as error:
        return {f"damaged: {folder}": str(error)}
    return {}


def _lasting(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _lasting(v) if isinstance(v, dict) else v for key, v in record.items() if key not in VOLATILE}


# Processes ------------------------------------------------------------------------------------------------------------


def run_child(
    argv: Sequence[str], disk: Path, *, spoil: tuple[int, int] = (0, 0), log: Path | None = None,
    kill: tuple[float, ...] = (), number: int = signal.SIGKILL,
) -> Ended:  # fmt: skip
    """Run the command line in a fork, with the call `spoil[0]` below `disk` spoilt in the mode `spoil[1]`.

    Args:
        kill: seconds after which the signal `number` is sent, one by one.
        log: where the calls are logged.
    """
    errors = disk.parent / "errors.txt"
    start = time.perf_counter()
    process = os.fork()
    if process == 0:
        _be_child(argv, disk, spoil, log, errors)
    for moment in kill:
        time.sleep(max(0.0, start + moment - time.perf_counter()))
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        os.kill(process, number)
    _, status = os.waitpid(process, 0)
    seconds = time.perf_counter() - start
    return Ended(os.waitstatus_to_exitcode(status), errors.read_text(encoding="utf-8", errors="replace"), seconds)


def _be_child(argv: Sequence[str], disk: Path, spoil: tuple[int, int], log: Path | None, errors: Path) -> None:
    status = 99
    try:
        os.setsid()
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import training.run.loop
        import training.run.summary
        from training.cli import main
        from training.storage.atomic import write_bytes

        def draw(run: training.run.context.Run) -> None:  # half a second saved: as a picture is written, but not drawn
            write_bytes(run.folder / "core_metrics_latest.png", b"picture")

        training.run.loop.draw = training.run.summary.draw = draw
        ctypes.CDLL(None).arm(str(disk).encode(), spoil[0], spoil[1], str(log or "").encode())
        status = main(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# Subjects -------------------------------------------------------------------------------------------------------------


def subjects(home: Path) -> list[Subject]:
    """A run, a study of four vmapped runs, and a run whose cache of tokens is what fails."""
    from tiny_onn_func.kernels.build import library

    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    os.environ |= {"TINY_ONN_CACHE": str(home / "cache"), "TINY_ONN_NATIVE_CACHE": str(home / "native")}
    library()  # the kernels are there before the faults: no compiler runs beside them
    disk = home / "disk"
    run = _a_run(home, disk)
    return [run, _a_study(home, disk), run._replace(name="cache", disk=home / "cache")]


def _a_run(home: Path, disk: Path) -> Subject:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in RUN.items()]
    flags += [f"--model.{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    out = disk / "run"
    fresh = ["train", f"--data={home / 'text.txt'}", f"--out={out}", *flags]
    return Subject("run", fresh, ["train", f"--out={out}", "--resume"], out, "config.yaml", disk)


def _a_study(home: Path, disk: Path) -> Subject:
    base = {key: value for key, value in RUN.items() if key not in ("picture_every", "sample_tokens")}
    study = {
        "question": "Is anything lost?", "falsifier": "A bit differs.", "margin": 0.02, "baseline": "plain",
        "seeds": [0, 1],
        "base": {"data": str(home / "text.txt"), **base, "model": SIZES},
        "arms": [{"name": "plain"}, {"name": "quick", "set": {"hyper.lr": 0.01}}],
    }  # fmt: skip
    write_yaml(study, home / "study.yaml")
    out = disk / "study"
    again = ["study", "--out", str(out), "--resume"]
    return Subject("study", ["study", str(home / "study.yaml"), "--out", str(out)], again, out, "study.yaml", disk)
