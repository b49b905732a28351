"""`tiny-onn doctor`: check this machine and a run or study folder; one line a finding, with advice where needed."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from tiny_onn_func.kernels import build
from training.errors import UserError, one_line
from training.run.device import choose_device
from training.run.nonfinite import EVIDENCE
from training.run.schedule import bends_text, read_legs
from training.run.settings import load_settings
from training.run.start import KINDS
from training.storage.checkpoint_files import ALONE, DRAFT, MEND, Damaged, read_meta, steps_in
from training.storage.lock import holder
from training.storage.plain_yaml import read_yaml
from training.storage.recorder import FILE, read_history, torn_line, unbroken_upto
from training.storage.regular_file import read_object
from training.storage.results import RESULTS, read_results

PACKAGE = "tiny-onn-func"
LITTLE = 1 << 30  # bytes free that a run should have at least


class Finding(NamedTuple):
    """One finding of the doctor's."""

    subject: str
    text: str
    advice: str = ""  # what to do; empty where all is well


def examine(folder: str | Path | None = None) -> list[Finding]:
    """Check the machine, and a run or study folder.

    Raises:
        UserError: there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: expected the folder of a run or a study, found none; name another, or none")
    findings = [*_versions(), *_machine(Path(folder or "."))]
    if folder is None:
        return findings
    home = Path(folder)
    findings += [*_lock(home), *_drafts(home)]
    settings = [home / "config.yaml"] if (home / "config.yaml").exists() else sorted(home.glob("runs/*/config.yaml"))
    findings += _study(home, len(settings))
    if not settings and not (home / "study.yaml").exists():
        findings.append(Finding(str(home), "no run in it", "name the folder that `tiny-onn train --out` made"))
    for path in settings:
        findings += _run(path.parent, alone=path.parent == home)
    findings += _unfinished(home, [path.parent for path in settings])
    for checkpoints in sorted(home.glob("checkpoints/*/checkpoints")):
        findings += _checkpoints(checkpoints)
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    try:
        wanted = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "not installed", "pip install -e . where pyproject.toml is")
        return
    yield Finding(PACKAGE, metadata.version(PACKAGE))
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version, "" if fits else f"untested; pip install '{requirement}'")


def _machine(folder: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = f"more than cores: --threads {cores}" if threads > cores else ""
    yield Finding("threads", f"{threads} of torch on {cores} cores", advice)
    device, reason = choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield Finding("device", f"{device} ({name}): {reason}")
    yield _native()
    free = shutil.disk_usage(folder).free
    yield Finding("free disk", f"{free / 1e9:.1f} GB", "" if free >= LITTLE else "free some, or saving will fail")


def _native() -> Finding:
    """Find the compiled kernels, or the reason why there are none."""
    if os.environ.get("TINY_ONN_NATIVE") == "0":
        return Finding("kernels", "left alone: TINY_ONN_NATIVE=0")
    try:
        return Finding("kernels", str(build.find_library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        advice = "all works without, several times slower; mend that, or set TINY_ONN_NATIVE=0"
        return Finding("kernels", f"none: {one_line(error)}", advice)


def _lock(home: Path) -> Iterator[Finding]:
    who = holder(home)
    if who is not None:
        yield Finding("in use", f"by {who}", "wait for it, or end it, before --resume")


def _drafts(home: Path) -> Iterator[Finding]:
    for draft in sorted(home.rglob(f"{DRAFT}*")):
        yield Finding(str(draft.relative_to(home)), "left by a process that was killed", "goes with the next --resume")


def _study(home: Path, runs: int) -> Iterator[Finding]:
    """Check study.yaml and results.csv, and that a study with results has its `runs` runs."""
    if not (home / "study.yaml").exists():
        return
    again = f"`tiny-onn study --out {home} --resume`"
    try:
        read_yaml(str(home / "study.yaml"))
        rows = read_results(home)
    except UserError as error:
        text, _, advice = str(error).partition("; ")
        yield Finding("study", text, advice or "restore the file")
        return
    except OSError as error:
        yield Finding("study", f"{error.filename}: {error.strerror}", f"move it away; {again} makes it anew")
        return
    if not runs:
        yield Finding("study", "no run in it", f"{f'remove {home / RESULTS}; ' if rows else ''}{again} makes them")
    elif not rows and len([*home.glob("runs/*/summary.json")]) == runs:
        yield Finding("results", f"{home / RESULTS}: no row of a run in it", f"{again} writes it")


def _run(home: Path, *, alone: bool) -> Iterator[Finding]:
    """Check one run; `alone` if it is no part of a study."""
    try:
        config = load_settings(str(home / "config.yaml"))
        yield Finding("settings", f"{home / 'config.yaml'}: {config.steps} steps")
    except UserError as error:
        yield Finding("settings", str(error), "restore the file")
        return
    legs = read_legs(home, config)
    if len(legs) > 1:
        mend = f"it is not the score of a run of {config.steps} steps; `tiny-onn report {home}` says how to repeat it"
        yield Finding("schedule", bends_text(legs), mend)
    saved_step = max((step for step, _ in steps_in(home / "checkpoints")), default=0)
    yield from _records(home, saved_step, alone=alone)
    yield from _checkpoints(home / "checkpoints")
    if alone and (home / "summary.json").exists() and not any(steps_in(home / kind) for kind in KINDS):
        mend = "move it away; then " if (home / "checkpoints").is_file() else ""
        text = f"{home / 'checkpoints'}: expected that of the finished run, got none"
        yield Finding("checkpoint", text, f"{mend}`tiny-onn train --out {home} --resume` begins anew")
    for step, path in steps_in(home / EVIDENCE / "checkpoints"):
        yield Finding(
            "bad numbers", f"in step {step + 1}: {path}", f"look with `tiny-onn rerun {home} --step {step + 1}`"
        )


def _unfinished(home: Path, runs: list[Path]) -> Iterator[Finding]:
    """Report a run, or a study's runs, without a summary.json, and each summary.json that is broken."""
    for path in (run / "summary.json" for run in runs):
        try:
            if path.exists():
                _check_summary(path)
        except UserError as error:
            again = f"; `tiny-onn train --out {home} --resume` then writes it again" if runs == [home] else ""
            yield Finding("summary", str(error).rpartition("; ")[0], f"restore the file, or remove it{again}")
    left = [run for run in runs if not (run / "summary.json").exists()]
    if left == [home]:
        saved_step = max((step for step, _ in steps_in(home / "checkpoints")), default=0)
        yield Finding("unfinished", f"steps saved: {saved_step}", _go_on(home, saved_step))
    elif left:
        yield Finding("unfinished", f"{len(left)} of {len(runs)} runs", f"tiny-onn study --out {home} --resume")


def _check_summary(path: Path) -> None:
    """Refuse a summary.json without a score; null is the score of a model whose numbers went wrong."""
    summary = read_object(path)
    if "nats_per_token" not in summary:
        raise UserError(f"{path}: expected the key nats_per_token, got none; restore the file or remove it")
    score = summary["nats_per_token"]
    if not isinstance(score, int | float | None):
        raise UserError(f"{path}: nats_per_token: expected a number, got {score!r:.40}; restore the file or remove it")


def _go_on(home: Path, saved_step: int) -> str:
    """Command that resumes a run; the step at which it was stopped by bad numbers would stop it again."""
    command = f"tiny-onn train --out {home} --resume"
    if all(step != saved_step for step, _ in steps_in(home / EVIDENCE / "checkpoints")):
        return command
    try:
        stops = load_settings(str(home / "config.yaml")).on_nonfinite == "stop"
    except UserError:  # `_run` reports it
        return command
    if not stops:
        return command
    return f"{command} --on-nonfinite skip; or begin anew in another --out, with a smaller --hyper.lr"


def _records(home: Path, saved_step: int, *, alone: bool) -> Iterator[Finding]:
    """Check that the records of all steps up to the checkpoint of step `saved_step` are there."""
    if not saved_step and not (home / FILE).exists():
        yield Finding("records", f"{home / FILE}: none yet")
        return
    try:
        for _ in unbroken_upto(home, saved_step):
            pass
        steps = [record.get("step", 0) for record in read_history(home)]
    except UserError as error:
        found = _of_error("records", error)
        yield found if alone else found._replace(advice="restore the file; the results of the study stand without it")
        return
    except OSError as error:  # a pipe, a folder or a file of somebody else
        yield Finding("records", f"{error.filename}: {error.strerror}", "restore the file")
        return
    if torn := torn_line(home):
        text, _, mend = torn.rpartition("; ")
        yield Finding("records", text, f"{mend}; a run that is not done mends it with --resume")
    whole = all(isinstance(step, int) for step in steps) and all(a < b for a, b in pairwise(steps))
    text = f"{home / FILE}: {len(steps)} records, the last of step {steps[-1] if steps else 0}"
    yield Finding("records", text, "" if whole else "out of order: an unfinished run mends it with --resume")


def _of_error(subject: str, error: UserError) -> Finding:
    """Split an error into a finding and its advice, which stands behind the last semicolon."""
    text, _, advice = str(error).rpartition("; ")
    return Finding(subject, text, advice)


def _checkpoints(home: Path) -> Iterator[Finding]:
    """Report every checkpoint; what to do about a damaged one depends on whether one before it is whole."""
    whole = False
    for _, path in steps_in(home):
        try:
            meta = read_meta(path)
            whole = True
            yield Finding("checkpoint", f"{path}: whole, SHA-256 {meta['sha256'][:12]}")
        except Damaged as error:
            yield _of_error("checkpoint", error if whole else UserError(str(error).replace(MEND, ALONE)))
        except UserError as error:
            yield _of_error("checkpoint", error)


def doctor(folder: str | Path | None = None) -> bool:
    """Print every finding; True if none of them needs advice."""
    findings = examine(folder)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark, advice = ("!!", f"  -> {finding.advice}") if finding.advice else ("ok", "")
        print(f"{mark}  {finding.subject:<{width}}  {finding.text}{advice}", file=sys.stdout)
    return not any(finding.advice for finding in findings)
