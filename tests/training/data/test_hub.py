"""Data sets by `hf:`: folders in the Hub's layout, a Hub that is not there, and what no data set may do."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from training.data import hub
from training.data.corpus import open_corpus
from training.data.hub import BUILDERS, Unreachable
from training.data.sources import documents, find_source
from training.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits, its cache and this program's below the test's folder."""
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    place = tmp_path / "set"
    place.mkdir()
    for split, count in (("train", 60), ("test", 30)):
        rows = [{"text": f"{split} document number {i}", "id": i} for i in range(count)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def texts(spec: str) -> list[str]:
    return ["".join(part.text for part in document) for document in documents(find_source(spec))]


def refused(match: str, spec: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_corpus(spec, sequence_length=4)
    assert str(caught.value).startswith(spec)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(spec)


def test_a_split_is_its_rows_in_their_order(folder: Path) -> None:
    assert texts(f"hf:{folder}:test") == [f"test document number {i}" for i in range(30)]
    assert texts(f"hf:{folder}") == texts(f"hf:{folder}:train") == [f"train document number {i}" for i in range(60)]


def test_a_data_set_has_the_tokens_of_the_file_that_it_is_made_of(folder: Path) -> None:
    ours, theirs = (open_corpus(spec, sequence_length=4) for spec in (f"{folder}/train.jsonl", f"hf:{folder}"))
    for side in ("train", "held_out"):
        assert getattr(ours, side).tokens.tolist() == getattr(theirs, side).tokens.tolist()


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")  # the library leaves a table open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["parquet", "csv", "txt"])
def test_folders_of_other_files_are_data_sets_too(kind: str, folder: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    place = folder.parent / kind
    place.mkdir()
    if kind == "txt":
        (place / "train.txt").write_text("one\ntwo\nthree\n")
    else:
        getattr(rows, f"to_{kind}")(place / f"train.{kind}")
    assert texts(f"hf:{place}") == ["one", "two", "three"]
    gc.collect()


def test_chats_of_a_data_set_are_those_of_lines(folder: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (folder / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    (folder / "test.jsonl").unlink()
    assert [*documents(find_source(f"hf:{folder}"))] == [*documents(find_source(f"{folder}/train.jsonl"))]


def test_a_changed_data_set_gives_a_new_entry_and_an_unchanged_one_none(folder: Path) -> None:
    first = open_corpus(f"hf:{folder}", sequence_length=4)
    assert open_corpus(f"hf:{folder}", sequence_length=4).folder == first.folder
    assert open_corpus(f"hf:{folder}:test", sequence_length=4).folder != first.folder
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "one more", "id": 60}\n')
    os.utime(folder / "train.jsonl", (5, 5))
    assert open_corpus(f"hf:{folder}", sequence_length=4).folder != first.folder


def unreachable(*_: object) -> None:
    raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(LocalEntryNotFoundError)")


def test_without_the_hub_a_data_set_that_was_read_once_is_read_from_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "hf:owner/name"
    builder = datasets.load_dataset_builder(str(folder))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: builder)
    first = open_corpus(spec, sequence_length=4)
    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    assert open_corpus(spec, sequence_length=4).folder == first.folder
    for other in ({"holdout": 0.2}, {"split": "tail"}):
        with pytest.raises(Unreachable, match="hf:owner/name: expected an answer of the Hub, got: Couldn't reach"):
            open_corpus(spec, sequence_length=4, **other)
    for path in folder.parent.glob("cache/*.txt"):
        path.write_text("../../elsewhere")
    refused("expected an answer of the Hub", spec)


def test_without_the_hub_one_line_says_so(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "training", "train", "--data=hf:owner/name", "--out=run"], cwd=tmp_path, text=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TINY_ONN_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("tiny-onn: hf:owner/name: expected an answer of the Hub, got: ")
    assert not (tmp_path / "run").exists()


def test_without_datasets_one_line_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"pip install tiny-onn-func\[data\]", f"hf:{folder}")


def test_a_spec_that_names_no_text_is_refused(folder: Path) -> None:
    refused("expected one of its splits, train, test, got 'dev'|test, train, got 'dev'", f"hf:{folder}:dev")
    for spec in ("hf:", "hf:csv", "hf:pandas", "hf:a/b:c:d:e", f"hf:{folder}/train.jsonl:x:y:z"):
        refused("expected hf:OWNER/NAME", spec)
    refused("BuilderConfig 'other' not found", f"hf:{folder}:other:train")
    (folder / "test.jsonl").unlink()
    for content, match in (
        ('{"content": "x", "id": 1}\n', "expected the column `text` or `messages`, got content, id"),
        ('{"text": 5}\n', "row 1: expected `text` to be a string, got a number"),
        ('{"text": "a"}\n{"text": null}\n', "row 2: expected `text` to be a string, got null"),
        ("oops\n", "expected a data set that can be read, got: JSON parse error"),
        ('{"text": ""}\n', "expected text, got none in its rows"),
        ('{"messages": [{"role": "user", "content": "?"}]}\n', "expected chats with assistant turns"),
    ):
        (folder / "train.jsonl").write_text(content)
        refused(match, f"hf:{folder}")


# Nothing that a data set brings is run --------------------------------------------------------------------------------


def test_a_script_of_a_data_set_is_not_run(folder: Path) -> None:
    place = folder.parent / "script"
    place.mkdir()
    code = f"open({str(folder / 'ran')!r}, 'w')"
    (place / "script.py").write_text(code)
    refused("expected a data set that can be read, got: ", f"hf:{place}")
    refused("Dataset scripts are no longer supported|expected a data set", f"hf:{place}/script.py")
    (place / "script.py").rename(place / "other.py")
    (place / "train.jsonl").write_text('{"text": "data"}\n')
    assert texts(f"hf:{place}") == ["data"]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["train.tar", "train.h5", "train.eval", "train.png", "train.pkl"])
def test_a_data_set_of_files_that_are_no_text_or_table_is_refused(name: str, folder: Path) -> None:
    place = folder.parent / "other"
    place.mkdir()
    (place / name).write_bytes(b"content")
    refused(f"expected a data set (of {', '.join(BUILDERS)} files|that can be read), got", f"hf:{place}")


def test_what_the_library_logs_of_an_error_stays_silent_and_its_loggers_as_they_were(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    before = {name: logging.getLogger(name).level for name in hub.NOISY}
    (folder / "train.jsonl").write_text("oops\n")
    refused("JSON parse error", f"hf:{folder}:train")
    assert {name: logging.getLogger(name).level for name in hub.NOISY} == before
    assert capsys.readouterr() == ("", "")


def test_no_code_of_a_hub_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    load = datasets.load_dataset_builder

    def noted(*args: Any, **named: Any) -> Any:
        calls.append((args, named))
        return load(*args, **named)

    monkeypatch.setattr("datasets.load_dataset_builder", noted)
    texts(f"hf:{folder}")
    assert calls == [((str(folder), None), {})]
