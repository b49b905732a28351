"""A record is followed by its new lines alone, from the start where it was replaced, and torn lines wait."""

import json
import os
from pathlib import Path

import pytest

from training.errors import UserError
from training.storage import recorder
from training.storage.cursor import Cursor, follow
from training.storage.recorder import FILE, read_history


def write(folder: Path, *steps: int, tail: str = "", mode: str = "a") -> None:
    with (folder / FILE).open(mode, encoding="ascii") as file:
        file.write("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


def look(folder: Path, cursor: Cursor) -> tuple[list[int], Cursor, bool]:
    """Steps behind a cursor, the cursor behind them, True if they are from the start."""
    steps, restarted = [], False
    for batch in follow(folder, cursor):
        steps += [record["step"] for record in batch.records]
        cursor, restarted = batch.cursor, restarted or batch.restarted
    return steps, cursor, restarted


def test_each_look_brings_what_is_new(tmp_path: Path) -> None:
    assert look(tmp_path, Cursor()) == ([], Cursor(), False), "no file yet"
    write(tmp_path, 1, 2)
    steps, cursor, restarted = look(tmp_path, Cursor())
    assert (steps, restarted, cursor.offset) == ([1, 2], True, (tmp_path / FILE).stat().st_size)
    assert look(tmp_path, cursor) == ([], cursor, False)
    write(tmp_path, 3)
    assert look(tmp_path, cursor)[0] == [3]


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *range(1000))
    _, cursor, _ = look(tmp_path, Cursor())
    write(tmp_path, 1000)
    parsed = []
    monkeypatch.setattr(recorder, "_parse", lambda line: parsed.append(line) or json.loads(line))
    assert look(tmp_path, cursor)[0] == [1000]
    assert len(parsed) == 1


def test_batches_are_small_and_whole(tmp_path: Path) -> None:
    write(tmp_path, *range(600))
    batches = [*follow(tmp_path, Cursor())]
    assert [len(batch.records) for batch in batches] == [256, 256, 88]
    assert [batch.restarted for batch in batches] == [True, False, False]
    assert [r for batch in batches for r in batch.records] == read_history(tmp_path)


@pytest.mark.parametrize("way", ["replaced", "cut"])
def test_a_record_that_was_replaced_or_cut_is_read_from_its_start(tmp_path: Path, way: str) -> None:
    write(tmp_path, *range(9))
    _, cursor, _ = look(tmp_path, Cursor())
    if way == "replaced":
        other = tmp_path / "other"
        other.mkdir()
        write(other, *range(20, 40))
        os.replace(other / FILE, tmp_path / FILE)
    else:
        write(tmp_path, 20, mode="w")
    steps, _, restarted = look(tmp_path, cursor)
    assert steps[0] == 20
    assert restarted


def test_a_torn_line_waits_for_its_end_and_is_refused_where_more_follow(tmp_path: Path) -> None:
    write(tmp_path, 1, tail='{"step"')
    steps, cursor, _ = look(tmp_path, Cursor())
    assert steps == [1]
    write(tmp_path, tail=": 2}\n")
    steps, cursor, _ = look(tmp_path, cursor)
    assert steps == [2]
    write(tmp_path, 3, tail="broken\n")
    steps, cursor, _ = look(tmp_path, cursor)
    assert steps == [3]
    write(tmp_path, 4)
    with pytest.raises(UserError, match=r"line 4: expected a JSON object, got 'broken\\n'; remove the line"):
        look(tmp_path, cursor)
