"""The record of a run survives kills and resumes, and is valid JSON whatever the numbers are."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.errors import UserError
from training.storage.recorder import open_recorder, read_history, to_record


class Measured(NamedTuple):
    main_loss: Tensor
    avg_k: Tensor
    expert_load: Tensor


def measured(step: int) -> Measured:
    return Measured(torch.tensor(5.0 / step), torch.tensor(2.5), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))


def write(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with open_recorder(folder, resume_step=resume_step, loggers=("tensorboard",)) as recorder:
        for step in steps:
            recorder.write(step, step * 100, step / 3, measured(step))


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_history(folder)]


def strict(text: str) -> Any:
    """JSON without the extensions of Python's reader."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


numbers = st.floats(width=32) | st.integers(-(2**40), 2**40) | st.booleans()
tensors = st.tuples(st.lists(st.floats(width=32), min_size=6, max_size=6), st.sampled_from([(6,), (2, 3), (3, 1, 2)]))


@given(st.dictionaries(st.text(max_size=5), numbers | tensors.map(lambda t: torch.tensor(t[0]).reshape(t[1]))))
def test_a_record_is_valid_json_that_holds_the_numbers(metrics: dict[str, Any]) -> None:
    record = strict(json.dumps(to_record(metrics), allow_nan=False))
    assert list(record) == list(metrics)
    for key, value in metrics.items():
        actual, wanted = np.array(record[key], dtype=float), torch.as_tensor(value).double().numpy()  # None becomes NaN
        np.testing.assert_allclose(actual, np.where(np.isfinite(wanted), wanted, np.nan), rtol=1e-3)


def test_scalars_keep_six_digits_and_numbers_their_kind() -> None:
    record = to_record({"a": torch.tensor(0.1), "b": torch.tensor(3), "c": 1 / 3, "d": 7, "e": torch.tensor(1e-30)})
    assert record == {"a": 0.1, "b": 3, "c": 0.333333, "d": 7, "e": 1e-30}
    assert isinstance(record["b"], int)
    assert to_record({"load": torch.tensor([[0.123456, 0.0]])}) == {"load": [[0.1235, 0.0]]}


def test_a_record_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, _name=name, _original=original: syncs.append(_name) or _original(self, *a)
        )
    to_record(measured(1))
    assert syncs == ["tolist"]


def test_what_is_written_is_read_back_with_the_keys_of_the_contract(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    history = read_history(tmp_path)
    assert history[1] == {
        "step": 2, "tokens": 200, "seconds": 0.667,
        "main_loss": 2.5, "avg_k": 2.5, "expert_load": [[0.25, 0.75], [1.0, 0.0]],
    }  # fmt: skip
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_write_returns_the_record_and_mappings_may_add_keys(tmp_path: Path) -> None:
    with open_recorder(tmp_path) as recorder:
        record = recorder.write(1, 10, 0.5, {**measured(1)._asdict(), "held_out_nats": 1.5, "lost": float("nan")})
    assert record["held_out_nats"] == 1.5
    assert record["lost"] is None
    assert read_history(tmp_path) == [record]


def test_a_file_cut_anywhere_reads_as_its_whole_records(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    full = read_history(tmp_path)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        ended = whole[: cut + 1].count(b"\n")  # a record that lacks nothing but its line end is whole
        assert read_history(tmp_path) == full[:ended], cut


def test_a_torn_line_of_zeros_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    assert steps_of(tmp_path) == [1, 2]


def test_damage_before_the_last_line_is_reported_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_history(tmp_path)


def test_a_folder_without_a_record_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected the record of a run"):
        read_history(tmp_path)


@pytest.mark.parametrize("tail", [b"", b'{"step":8,"tok'])
def test_resuming_leaves_no_gap_and_nothing_twice(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, range(1, 8))
    before = read_history(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    write(tmp_path, range(5, 10), resume_step=4)
    assert steps_of(tmp_path) == list(range(1, 10))
    assert read_history(tmp_path)[:4] == before[:4]


def test_resuming_without_a_record_starts_one(tmp_path: Path) -> None:
    write(tmp_path / "new", range(5, 7), resume_step=4)
    assert steps_of(tmp_path / "new") == [5, 6]


def test_a_resume_that_is_killed_while_rewriting_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_recorder(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_fresh_record_never_overwrites_an_old_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    with pytest.raises(UserError, match="expected no record of an earlier run"):
        open_recorder(tmp_path)
    assert steps_of(tmp_path) == [1, 2]


def test_each_record_is_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    with open_recorder(tmp_path) as recorder:
        for step in (1, 2):
            recorder.write(step, 0, 0.0, measured(step))
            assert steps_of(tmp_path)[-1] == step
    recorder.close()  # a second time


def test_tensorboard_shows_every_scalar_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 8), resume_step=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["avg_k", "main_loss"]
    events = board.Scalars("main_loss")
    assert [event.step for event in events] == list(range(1, 8))
    assert events[1].value == 2.5


def test_without_tensorboard_the_run_goes_on_with_one_line_of_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]
    assert not (tmp_path / "tensorboard").exists()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "warning: no more tensorboard from here on (import of torch.utils.tensorboard halted; " in err
