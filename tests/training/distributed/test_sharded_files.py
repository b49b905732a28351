"""Sharded checkpoints that are not what was written: one line, nothing run, and no state that is partly loaded."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.training.distributed.processes import ABOUT, FIXED, trained
from training.distributed import sharded_checkpoint
from training.distributed.collectives import Group
from training.distributed.layout import Layout
from training.distributed.sharded_checkpoint import gather_sharded, load_sharded, open_sharded, save_sharded
from training.errors import UserError
from training.storage.checkpoint_files import digest, sha256

ALONE = Layout(Group(), Group(), Group())
SHARD, NAME, PLACES = "shard-00001-model-00001-of-00001.safetensors", "params.dense", "DCP_SHARDING_INFO"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sharded")
    with pytest.warns(UserWarning, match="no_dist|single process"):
        save_sharded(home, trained(), FIXED, ALONE, ABOUT, 1, None)
    return home / "sharded" / "step_000003"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run" / "sharded" / written.name))


def resigned(folder: Path, **changes: object) -> None:
    """Right checksums, as a stranger would make them."""
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"sha256": {path.name: sha256(path) for path in folder.glob("*.safetensors")}} | changes
    meta.pop("checksum")
    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": digest(meta)}))


def rewritten(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """The shard with other tensors, or other places of them."""
    with safe_open(folder / SHARD, framework="pt") as file:
        said = json.loads(file.metadata()[PLACES])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, said)
    save_file(tensors, folder / SHARD, metadata={PLACES: json.dumps(said)})
    resigned(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_sharded(open_sharded(folder), FIXED, ALONE)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))
    return str(error.value)


def second(folder: Path, start: int) -> None:
    """Another shard, which says that it holds what begins at `start`."""
    with safe_open(folder / SHARD, framework="pt") as file:
        tensor = file.get_tensor(NAME)[-8:].clone()
    places = {NAME: {"saved_offsets": [start]}}
    other = folder / SHARD.replace("00001-model", "00002-model")
    save_file({NAME: tensor}, other, metadata={PLACES: json.dumps(places)})
    resigned(folder)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / SHARD),
    "a flipped bit of meta.json": lambda folder: flip(folder / "meta.json"),
    "no shard": lambda folder: (folder / SHARD).unlink(),
    "cut short": lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100]),
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "meta.json is a list": lambda folder: (folder / "meta.json").write_text("[]"),
    "a foreign shard": lambda folder: shutil.copy(folder / SHARD, folder / "shard-00009.safetensors"),
    "a shard is a folder": lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()),
}
HOSTILE = {
    "a resigned cut": lambda folder: (
        (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100]),
        resigned(folder),
    ),
    "no safetensors": lambda folder: ((folder / SHARD).write_bytes(b"\x80\x04" + b"x" * 100), resigned(folder)),
    "an empty shard": lambda folder: ((folder / SHARD).write_bytes(b""), resigned(folder)),
    "no shard at all": lambda folder: ((folder / SHARD).unlink(), resigned(folder)),
    "another dtype": lambda folder: rewritten(folder, lambda t, _: t.update({NAME: t[NAME].double()})),
    "another shape": lambda folder: rewritten(folder, lambda t, _: t.update({NAME: t[NAME][:-1].clone()})),
    "another rank": lambda folder: rewritten(folder, lambda t, _: t.update({NAME: t[NAME][None].clone()})),
    "a scalar with an axis": lambda folder: rewritten(folder, lambda t, _: t.update({"step": t["step"][None].clone()})),
    "a gap": lambda folder: rewritten(folder, lambda _, said: said[NAME].update(saved_offsets=[8])),
    "a tensor too few": lambda folder: rewritten(folder, lambda t, _: t.pop(NAME)),
    "a tensor too many": lambda folder: rewritten(folder, lambda t, said: add(t, said, "params.more")),
    "a place below zero": lambda folder: rewritten(folder, lambda _, said: said[NAME].update(saved_offsets=[-8])),
    "a place that is text": lambda folder: rewritten(folder, lambda _, said: said[NAME].update(saved_offsets=["x"])),
    "a place beyond numbers": lambda folder: rewritten(folder, lambda _, s: s[NAME].update(saved_offsets=[1 << 70])),
    "places that are a list": lambda folder: rewritten(folder, lambda _, said: said.update({NAME: []})),
    "no places": lambda folder: rewritten(folder, lambda _, said: said.clear()),
    "an overlap": lambda folder: second(folder, 0),
    "beyond the end": lambda folder: second(folder, 1 << 40),
    "another format": lambda folder: resigned(folder, format=3),
    "a step that is text": lambda folder: resigned(folder, step="three"),
    "checksums that are text": lambda folder: resigned(folder, sha256="abc"),
}  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add(tensors: dict, said: dict, name: str) -> None:
    tensors[name], said[name] = torch.zeros(3), {"saved_offsets": [0]}


@pytest.mark.parametrize("case", DAMAGE | HOSTILE)
def test_a_broken_sharded_checkpoint_is_refused_in_a_line(copy: Path, case: str) -> None:
    (DAMAGE | HOSTILE)[case](copy)
    assert re_mend(refusal(copy))


def re_mend(line: str) -> bool:
    """True if the line says what to do."""
    mends = ("remove this step's folder", "own config.yaml", "load it with the version that wrote it")
    return any(mend in line for mend in mends)


def test_the_whole_checkpoint_is_loaded(copy: Path) -> None:
    """The negative twin: nothing is refused where nothing is broken, nor for files that are not shards."""
    (copy / "notes.txt").write_text("mine")
    rewritten(copy, lambda tensors, _: tensors)
    loaded = load_sharded(open_sharded(copy), FIXED, ALONE)
    assert int(loaded.step) == 3


def test_another_model_is_refused_by_the_name_of_a_tensor(copy: Path) -> None:
    other = type(FIXED)(**(asdict(FIXED) | {"num_hidden_layers": FIXED.num_hidden_layers + 1}))
    with pytest.raises(UserError, match=r"router\S*: expected \(3, .*, got \(2, .*; use the sizes in"):
        load_sharded(open_sharded(copy), other, ALONE)


@pytest.mark.parametrize("model", [{}, {"hidden_size": "wide"}, {"evil": 1}])
def test_sizes_of_no_model_are_refused_in_a_line(copy: Path, model: dict) -> None:
    resigned(copy, model=model)
    with pytest.raises(UserError, match="expected the sizes of a model, got"):
        gather_sharded(copy.parents[1])


class Hostile:
    """Unpickled, it would leave a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_a_pickle_of_an_older_version_is_refused_with_the_way_to_convert_it_and_never_opened(copy: Path) -> None:
    trace = copy.parent / "trace"
    hostile = pickle.dumps(Hostile(trace))
    (copy / ".metadata").write_bytes(hostile)
    line = refusal(copy)
    assert "got .metadata, a pickle of an older version, never opened; with that version run `tiny-onn export" in line
    assert not trace.exists()
    pickle.loads(hostile)  # the negative twin: it is hostile indeed
    assert trace.exists()


def test_no_module_of_sharded_checkpoints_can_execute_what_it_loads() -> None:
    source = Path(sharded_checkpoint.__file__).read_text(encoding="utf-8")
    for word in ("import pickle", "Unpickler", "torch.load", "FileSystemReader"):
        assert word not in source


def test_a_disk_that_refuses_leaves_the_checkpoint_before_and_one_line(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written.parent, tmp_path / "sharded")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint, "write_meta", full)
    later = trained()._replace(step=torch.tensor(4))
    with pytest.raises(UserError) as error, pytest.warns(UserWarning, match="no_dist|single process"):
        save_sharded(tmp_path, later, FIXED, ALONE, ABOUT, 1, None)
    assert "\n" not in str(error.value)
    assert "No space left on device; free space" in str(error.value)
    assert [path.name for path in (tmp_path / "sharded").iterdir()] == [written.name]


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save", full)
    with pytest.raises(UserError) as error, pytest.warns(UserWarning, match="no_dist|single process"):
        save_sharded(tmp_path, trained(), FIXED, ALONE, ABOUT, 1, None)
    assert "\n" not in str(error.value)
    assert "No space left on device; free space" in str(error.value)
    assert [*(tmp_path / "sharded").iterdir()] == []
