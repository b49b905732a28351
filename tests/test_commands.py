"""Every command of every page runs, or is parsed by the program's own parser and has its reason here."""

import argparse
import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.helpers import ROOT
from training import cli
from training.run.settings import parse_train_args

PAGES = {"README.md": ROOT / "README.md"} | {f"docs/{path.name}": path for path in sorted((ROOT / "docs").glob("*.md"))}
SHELLS = ("bash", "")  # a block without a language holds commands that are not to be copied as they are
SHORT = {  # flags that keep a run short; the last one of a name counts
    "train": "--steps 2 --threads 1 --eval-bytes 2048 --final-eval-bytes 2048 --sample-tokens 4",
    "generate": "--tokens 4",
    "evaluate": "--bytes 2048",
}
ELSEWHERE = {  # beginning of a command -> why it is not run here
    "pip install": "the network; test_readme.py asks for its extras",
    "pre-commit install": "changes the repository's own .git",
    "ruff check": "a line of .ci/run",
    "ruff format": "a line of .ci/run",
    "typos": "a line of .ci/run",
    "mypy": "a line of .ci/run",
    "lint-imports": "a line of .ci/run",
    "pytest": "a line of .ci/run",
    "hf auth login": "the network, and an account",
    "tiny-onn export runs/mine --out exported --force --push": "the network, and an account",
    "torchrun": "several processes or machines; tests/training/distributed runs torchrun",
    "tiny-onn export runs/mine --from-sharded": "several processes; tests/training/distributed gathers one",
    "tiny-onn study FILE.yaml --launcher ray": "a Ray cluster; test_ray_launcher.py runs one",
    "tiny-onn study --resume --out runs/FILE --launcher ray": "a Ray cluster; test_ray_launcher.py runs one",
    "tiny-onn study collapse": "70 runs, minutes; test_runner.py resumes a small study",
    "tiny-onn study --resume --out runs/collapse": "70 runs, minutes; test_runner.py resumes a small study",
    "python -m benchmarks.scaling.report --measure": "minutes of timing; test_scaling.py does it in small",
    "python benchmarks/experiments/lm_eval_smoke.py": "lm_eval, which no extra has",
}
RUN_BY_ANOTHER_TEST = {"docs/huggingface.md": "tests/training/commands/test_surgery.py"}  # its bash blocks


class Block(NamedTuple):
    """A shell block of a page."""

    page: str
    language: str
    text: str

    @property
    def is_script(self) -> bool:
        return self.text.startswith("#!")


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The shell blocks of a page, found by their fences, line by line."""
    language: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if fence := re.match(r"\s*```(.*)", line):
            if language is None:
                language, lines = fence[1].strip(), []
                continue
            if language in SHELLS:
                yield Block(page, language, "\n".join(lines))
            language = None
        elif language is not None:
            lines.append(line)


BLOCKS = [block for page, path in PAGES.items() for block in blocks_of(page, path.read_text(encoding="utf-8"))]


def lines_of(block: Block) -> list[str]:
    """The commands of a block, continued lines joined, comments and redirections left away."""
    joined = block.text.replace("\\\n", " ").splitlines()
    parts = [part.split(" #")[0].split(" > ")[0].strip() for line in joined for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def commands() -> list[tuple[str, str]]:
    """(page, command) of all blocks that are no scripts."""
    return [(block.page, line) for block in BLOCKS if not block.is_script for line in lines_of(block)]


def reason_of(command: str) -> str | None:
    """Why a command is not run here; None if it is."""
    return next((reason for start, reason in ELSEWHERE.items() if command.startswith(start)), None)


def is_run_here(page: str, command: str) -> bool:
    by_another = page in RUN_BY_ANOTHER_TEST and any(
        block.page == page and block.language == "bash" and command in lines_of(block) for block in BLOCKS
    )
    return reason_of(command) is None and not by_another


HERE = {page: [command for p, command in commands() if p == page and is_run_here(p, command)] for page in PAGES}
NOT_HERE = sorted({command for _, command in commands() if reason_of(command)})


def test_pages_have_commands() -> None:
    assert len({page for page, _ in commands()}) >= 8
    assert sum(map(len, HERE.values())) >= 20


def test_every_reason_is_that_of_a_command() -> None:
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for _, line in commands())] == []


def test_what_ci_runs_is_there() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for start, reason in ELSEWHERE.items():
        if reason == "a line of .ci/run":
            assert re.search(rf"^{start}\b", script, re.MULTILINE), start


@pytest.mark.timeout(1800)  # trains and makes a study, on a machine that may be busy
@pytest.mark.parametrize("page", [page for page, own in HERE.items() if own])
def test_the_commands_of_a_page_run_in_a_fresh_folder(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after another, with fewer steps; the folder has the README alone."""
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    monkeypatch.chdir(tmp_path)
    if page == "docs/studies.md":  # the study of another page's command
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if page == "docs/training.md":  # whose second command makes runs/mine, and the third goes on with it
        assert HERE[page][2] == "tiny-onn train --out runs/mine --resume"
    for command in HERE[page]:
        run(command, capsys)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; `tiny-onn` in this process, all else in one of its own."""
    words = shlex.split(command.removeprefix("source <(").removesuffix(")"))
    if words[0] == "tiny-onn":
        short = [] if any(word.startswith("--print") for word in words) else shlex.split(SHORT.get(words[1], ""))
        try:
            status = cli.main([*words[1:], *short])
        except SystemExit as end:  # after --print-config and the like
            status = int(end.code or 0)
        output = capsys.readouterr()
        assert status == 0 or words[1] == "doctor", f"{command}: {output.err}"
        assert output.out.strip(), command
        return
    assert words[:2] == ["python", "-m"], f"{command}: neither run nor listed with a reason"
    done = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Commands that are parsed only ----------------------------------------------------------------------------------------


class _ParsedError(Exception):
    """The arguments were taken."""


def parse(command: str) -> None:
    """Give a command to the parser of its program.

    Raises:
        Exception: it does not take it.
    """
    words = shlex.split(command)
    program, rest = words[0], words[1:]
    if program == "tiny-onn" and rest[0] == "train":
        parse_train_args(rest[1:])
    elif program == "tiny-onn":
        cli._parser_of(getattr(cli, f"_{rest[0]}")).parse_args(rest[1:])
    elif program == "torchrun":
        parse_torchrun(rest)
    elif program == "pip":
        internal = importlib.import_module("pip._internal.commands")
        internal.create_command(rest[0]).parser.parse_args(rest[1:])
    elif program == "python":
        parse_module(rest[1:] if rest[0] == "-m" else [rest[0].removesuffix(".py").replace("/", "."), *rest[1:]])
    elif program == "ray":
        importlib.import_module("ray.scripts.scripts").start.make_context("ray start", rest[1:])
    elif program == "hf":
        done = subprocess.run([program, *rest, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert ELSEWHERE_IS_ENOUGH.match(command), f"{command}: no parser is known for it"


ELSEWHERE_IS_ENOUGH = re.compile(r"(ruff|typos|mypy|lint-imports|pytest|pre-commit)\b")  # tools with lines in .ci/run


def parse_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.module
    assert args.training_script == "training"
    parse(shlex.join(["tiny-onn", *args.training_script_args]))


def parse_module(words: Sequence[str]) -> None:
    """Let a module's main() parse its arguments, and stop it there."""
    original = argparse.ArgumentParser.parse_known_args  # which `parse_args` calls

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> NoReturn:
        original(self, [*words[1:]])
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_ParsedError):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", [*words])
        importlib.import_module(words[0]).main()
        raise AssertionError(f"{words[0]}: parsed nothing")


@pytest.mark.parametrize("command", NOT_HERE)
def test_a_command_that_is_not_run_is_taken_by_its_parser(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parse(command)


@pytest.mark.parametrize(
    ("command", "flag"),
    [("tiny-onn export runs/mine --out x --form-sharded", "form"), ("torchrun -m training train --stepz 3", "stepz")],
)
def test_a_flag_that_no_parser_knows_would_be_noticed(command: str, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        parse(command)


SCRIPTS = [block for block in BLOCKS if block.is_script]
VARIABLES = {
    "$study": "routers", '"$out"': "runs/out", '"$head"': "node0:29500", '"$head:29500"': "node0:29500", "$resume": "",
    '"$SLURM_NNODES"': "2", '"$SLURM_JOB_ID"': "1", '"$SLURM_CPUS_PER_TASK"': "4", '"$memory"': "1000000000",
}  # fmt: skip
PROGRAM = re.compile(r"\b(?:torchrun|tiny-onn|ray start) .*")


@pytest.mark.parametrize("script", SCRIPTS, ids=[block.page for block in SCRIPTS])
def test_a_script_for_a_cluster_is_one_of_the_shell_and_its_programs_take_their_arguments(script: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=script.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = 0
    for line in script.text.replace("\\\n", " ").splitlines():
        if (match := PROGRAM.search(line)) and not line.startswith("#"):
            command = match[0].removesuffix("&").strip()
            for name, value in VARIABLES.items():
                command = command.replace(name, value)
            assert "$" not in command, command
            parse(command)
            found += 1
    assert found >= 1
