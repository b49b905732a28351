"""Hostile input: a sample of every reader's, the cases that were found once, and what each reader must never do."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers import ROOT
from tests.robustness.fault_subjects import SIZES, TEXT
from tests.robustness.hostile import SPECIAL
from training.cli import main
from training.data.corpus import open_corpus
from training.data.readers import LINE
from training.data.sources import documents, find_source
from training.errors import LONGEST, UserError, one_line
from training.run.finished import open_run
from training.storage.checkpoint_files import digest, sha256
from training.storage.plain_yaml import MOST_VALUES, read_yaml
from training.storage.recorder import read_history
from training.storage.regular_file import open_regular, read_object, read_small
from training.storage.results import read_results
from training.study.plan import load_plan
from training.study.report import write_report


def fuzzed(tmp_path: Path, *flags: str) -> dict[str, dict]:
    """What `python -m tests.robustness.fuzz` found, by reader."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.robustness.fuzz", "--json", str(out), *flags]
    said = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=7200)
    assert out.exists(), said.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_sample_of_hostile_input_to_every_reader_is_a_value_or_one_line(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path, "--inputs", "15", "--seed", "7")
    assert {name: outcome["faults"] for name, outcome in outcomes.items() if outcome["faults"]} == {}
    assert len(outcomes) >= 17
    assert sum(outcome["refused"] + outcome["plain"] for outcome in outcomes.values()) > 60


@pytest.mark.slow
def test_ten_thousand_hostile_inputs_to_every_reader(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path)
    assert {name: outcome["faults"] for name, outcome in outcomes.items() if outcome["faults"]} == {}


# Files that are none --------------------------------------------------------------------------------------------------


READERS: dict[str, Callable[[Path], object]] = {
    "config.yaml": lambda path: read_yaml(str(path)),
    "metrics.jsonl": lambda path: read_history(path.parent),
    "summary.json": read_object,
    "results.csv": lambda path: read_results(path.parent),
    "text.txt": lambda path: open_corpus(str(path), sequence_length=8, cache_dir=path.parent / "cache"),
    "rows.jsonl": lambda path: open_corpus(str(path), sequence_length=8, cache_dir=path.parent / "cache"),
    **dict.fromkeys(
        ("rows.csv", "shard.tar", "text.txt.zst"),
        lambda path: open_corpus(str(path), sequence_length=8, cache_dir=path.parent / "cache"),
    ),
    "text.txt.gz": lambda path: open_corpus(str(path), sequence_length=8, cache_dir=path.parent / "cache"),
}


@pytest.mark.parametrize("kind", ["pipe", "loop", "endless", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / name)
    start = time.perf_counter()
    if (name, kind) == ("results.csv", "loop"):
        assert read_results(tmp_path) == []  # nothing is there
        return
    with pytest.raises((UserError, OSError)):
        READERS[name](tmp_path / name)
    assert time.perf_counter() - start < 2


def test_a_file_that_becomes_a_pipe_between_look_and_opening_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    looks = iter((True, False))
    monkeypatch.setattr("training.storage.regular_file._is_regular", lambda _: next(looks))
    with pytest.raises(OSError, match="a pipe or a device"):
        open_regular(tmp_path / "pipe")


def test_a_file_larger_than_what_it_should_be_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        read_small(tmp_path / "sparse", 1000)


def test_a_text_that_changes_while_it_is_read_gives_a_value_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = "".join(json.dumps({"text": f"{i} {TEXT[:200]}"}) + "\n" for i in range(400))
    path.write_text(rows, encoding="utf-8")
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with path.open("r+", encoding="utf-8") as file:
                file.truncate(len(rows) // (1 + number % 3))
                file.seek(len(rows) // (1 + number % 5))
                file.write(rows[: 50 * (number % 7)])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for attempt in range(10):
            with suppress(UserError):
                open_corpus(str(path), sequence_length=8, cache_dir=tmp_path / f"cache{attempt}")
    finally:
        stop.set()
        thread.join()


# Bombs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefghi")),
        "a: &a {x: 1}\n"
        + "".join(f"{c}: &{c} {{<<: [{', '.join([f'*{p}'] * 9)}]}}\n" for p, c in pairwise("abcdefghi")),
        "a: &a [*a]\n",
    ],
    ids=["laughs", "merges", "itself"],
)  # fmt: skip
def test_aliases_that_stand_for_a_billion_values_are_refused_before_they_are_written_out(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "bomb.yaml").write_text(text, encoding="utf-8")
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"at most {MOST_VALUES:,} values"):
        read_yaml(str(tmp_path / "bomb.yaml"))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("opened", ["[", "{", "- ", "a: ["])
def test_values_in_values_without_end_are_refused_at_once(opened: str, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text(opened * 20_000, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(UserError, match=r"deep\.yaml: line 1: (expected at most 50 levels|mapping values are not)"):
        read_yaml(str(tmp_path / "deep.yaml"))
    assert time.process_time() - start < 1


def test_aliases_of_people_are_fine(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("base: &base {a: 1}\nmore: [*base, *base]\n", encoding="utf-8")
    assert read_yaml(str(tmp_path / "plain.yaml"))["more"] == [{"a": 1}] * 2


def test_many_keys_take_no_square_of_their_number(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("".join(f"k{i}: 1\n" for i in range(10_000)), encoding="utf-8")
    start = time.perf_counter()
    assert len(read_yaml(str(tmp_path / "keys.yaml"))) == 10_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("opened", ["[", '{"text": "', '{"messages": [{"role": '])
def test_a_line_of_a_hundred_megabytes_is_refused_in_little_memory(opened: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        file.write(opened.encode())
        for _ in range(100):
            file.write(b"[" * (1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"line 1: expected at most {LINE:,} bytes, got more"):
        list(documents(find_source(str(path))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_text_of_a_single_line_of_a_hundred_megabytes_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"a line without an end " * 47_663)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(len(part.text) for document in documents(find_source(str(path))) for part in document)
    assert size == path.stat().st_size > 100e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"text":' * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud800"}']
)
def test_deep_json_and_long_numbers_are_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        open_corpus(str(tmp_path / "rows.jsonl"), sequence_length=8, cache_dir=tmp_path / "cache")
    assert str(caught.value).isprintable()


def test_a_record_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b"[" * (LINE + 10) + b"\n")
    with pytest.raises(UserError, match="line 2: expected a JSON object"):
        read_history(tmp_path)


# What a line may hold, and where a name may lead ----------------------------------------------------------------------


def test_an_error_is_one_line_without_control_characters_whatever_a_file_holds() -> None:
    error = UserError("key\x1b[31m\n\ttwo  \x00 \ud800\u202e: é")
    assert str(error) == "key\\x1b[31m two \\x00 \\ud800\\u202e: é"
    assert len(one_line("x" * 10**6)) <= LONGEST + 3


def test_the_terminal_gets_no_control_characters_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text('"\\e[31mkey\\n": 1\n', encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip().isprintable()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../../victim", "/victim", "group_0/../../victim", "", ".", "group_000/x"])
def test_a_forged_plan_names_no_folder_outside_the_study(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({name: []}), encoding="utf-8")
    with pytest.raises(UserError, match="expected the plan of this study's runs"):
        load_plan([], tmp_path)


@pytest.mark.parametrize("run", ["../other", "/etc", "a/b", "..", "."])
def test_a_forged_table_names_no_folder_outside_the_study(run: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(f"run,arm,seed,status\n{run},a,0,finished\n", encoding="utf-8")
    with pytest.raises(UserError, match="run: expected the name of a folder"):
        read_results(tmp_path)


def test_a_table_without_a_row_s_arm_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("run,seed,status\nx,0,finished\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.csv, line 2: expected arm"):
        read_results(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    home = tmp_path_factory.mktemp("run")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = [f"--model.{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    few = ["--steps=2", "--batch-size=2", "--sequence-length=16", "--eval-every=0", "--final-eval-bytes=60"]
    out = home / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(home / "cache"))
        assert main(["train", f"--data={home / 'text.txt'}", f"--out={out}", "--sample-tokens=0", *few, *flags]) == 0
    return out


@pytest.mark.parametrize("content", ["[]", "{", '{"nats_per_token": "x"}', '{"nats_per_token": 1}', '{"alarms": 3}'])
def test_a_report_of_a_run_with_a_forged_summary_is_one_line(
    content: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = (run / "summary.json").read_text(encoding="utf-8")
    (run / "summary.json").write_text(content, encoding="utf-8")
    try:
        assert main(["report", str(run)]) == 2
    finally:
        (run / "summary.json").write_text(right, encoding="utf-8")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("tiny-onn: ")


def test_a_baseline_that_no_chart_can_hold_is_left_out(run: Path) -> None:
    right = (run / "summary.json").read_text(encoding="utf-8")
    forged = json.loads(right) | {"baselines": {"huge": 1e308, "bigram": 3.5}}
    (run / "summary.json").write_text(json.dumps(forged), encoding="utf-8")
    try:
        page = write_report(run).path.read_text(encoding="utf-8")
    finally:
        (run / "summary.json").write_text(right, encoding="utf-8")
    assert "bigram" in page
    assert "1e+308" not in page


def test_a_forged_checkpoint_whose_checksums_are_right_is_refused_with_the_leaf(run: Path, tmp_path: Path) -> None:
    for change, named in (
        (lambda t: {**t, "params.norm": torch.zeros(3)}, "params.norm"),
        (lambda t: {**t, "params.norm": t["params.norm"].long()}, "params.norm"),
        (lambda t: {**t, "params.norm.deep": torch.zeros(1)}, "one below another"),
        (lambda t: {**t, "params." + "a." * 40: torch.zeros(1)}, "too deep"),
    ):
        copy = tmp_path / named
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (step,) = copy.glob("checkpoints/step_*")
        with safe_open(step / "state.safetensors", "pt") as file:
            tensors = change({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        save_file(tensors, step / "state.safetensors", metadata={"leaves": json.dumps([*tensors])})
        meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
        meta |= {"sha256": sha256(step / "state.safetensors")}
        meta.pop("checksum")
        (step / "meta.json").write_text(json.dumps(meta | {"checksum": digest(meta)}), encoding="utf-8")
        with pytest.raises(UserError, match=named):
            open_run(copy)
