"""A checkpoint is bitwise the state that was saved, whole or not there; damage is one line that names the file."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import tree_map, walk
from training.errors import UserError
from training.storage import checkpoint, checkpoint_files
from training.storage.checkpoint import latest_checkpoint, load_checkpoint, load_params, save_checkpoint

CONFIG = ModelConfig(257, 8, 1, 2, 1, 4, 4, 3, num_experts_per_tok=2)
MODEL = asdict(CONFIG)


class Moments(NamedTuple):
    count: torch.Tensor
    mu: dict
    nu: dict


class State(NamedTuple):
    params: dict
    expert_opt: Any
    router_opt: Any
    step: torch.Tensor


def state_of(step: int, seed: int = 0) -> State:
    draw = torch.Generator().manual_seed(seed)
    params = {
        "embed": torch.randn(5, 4, generator=draw),
        "layers": {"moe": {"router": torch.randn(2, 4, 3, generator=draw), "w2": torch.randn(2, 3, 4, generator=draw)}},
    }
    moments = Moments(torch.tensor(step), tree_map(torch.square, params), tree_map(torch.neg, params))
    return State(params, moments, (), torch.tensor(step))


def save(folder: Path, state: Any, keep: int = 2) -> Path:
    return save_checkpoint(folder, state, MODEL, keep=keep)


def bits(tree: Any) -> list:
    """Names, types, shapes and the very bytes of the leaves."""
    return [(name, leaf.dtype, leaf.shape, raw(leaf)) for name, leaf in walk(tree)]


def raw(leaf: torch.Tensor) -> bytes:
    return bytes(leaf.detach().contiguous().flatten().view(torch.uint8).tolist()) if leaf.numel() else b""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def complaint(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trip

DTYPES = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.int64: torch.int64}


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any bits at all: NaNs with payloads, infinities, -0.0; 0-d, empty and strided tensors."""
    dtype = draw(st.sampled_from([*DTYPES]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    limits = torch.iinfo(DTYPES[dtype])
    count = int(torch.tensor(shape, dtype=torch.int64).prod())
    numbers = draw(st.lists(st.integers(limits.min, limits.max), min_size=count, max_size=count))
    leaf = torch.tensor(numbers, dtype=DTYPES[dtype]).view(dtype).reshape(shape)
    return leaf.mT if leaf.dim() > 1 and draw(st.booleans()) else leaf


keys = st.text("abw2_é", min_size=1, max_size=4)
branches = lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3) | st.lists(inner, max_size=2)  # noqa: E731
trees = st.recursive(tensors(), branches, max_leaves=6)


@given(params=st.dictionaries(keys, trees, min_size=1, max_size=3), opt=trees, step=st.integers(0, 10**7))
def test_every_tree_comes_back_bit_for_bit(params, opt, step, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    state = State(params, Moments(torch.tensor(step), {"mu": opt}, {}), (), torch.tensor(step))
    path = save(folder, state)
    assert path == latest_checkpoint(folder) == folder / f"checkpoints/step_{step:06d}"
    loaded = load_checkpoint(path, like=tree_map(torch.zeros_like, state))
    assert bits(loaded) == bits(state)
    assert (type(loaded), type(loaded.expert_opt)) == (State, Moments)
    assert loaded.params.keys() == params.keys()
    shutil.rmtree(folder)


def test_saving_leaves_the_state_alone_and_loading_gives_memory_of_its_own(tmp_path):
    state = state_of(3)
    before = bits(state)
    path = save(tmp_path, state)
    assert bits(state) == before
    first, second = load_checkpoint(path), load_checkpoint(path)
    first["params"]["embed"].zero_()
    shutil.rmtree(path)
    assert torch.equal(second["params"]["embed"], state.params["embed"])


def test_shared_expanded_and_tracked_tensors_are_saved_as_values(tmp_path):
    base = torch.arange(6.0)
    params = {"b": base, "a": base, "row": base[2:4], "wide": base[:1].expand(3), "grad": base.clone().requires_grad_()}
    path = save(tmp_path, {"params": params, "step": torch.tensor(1)})
    loaded, config = load_params(path)
    assert bits(loaded) == bits(params)
    assert config == CONFIG


def test_without_a_pattern_the_state_is_nested_dicts_with_its_names_and_order(tmp_path):
    state = state_of(4)
    loaded = load_checkpoint(save(tmp_path, state))
    assert bits(loaded) == bits(state)
    assert torch.equal(loaded["expert_opt"]["mu"]["layers"]["moe"]["w2"], state.params["layers"]["moe"]["w2"].square())


def test_parameters_and_sizes_load_without_the_optimizer_from_a_run_folder_too(tmp_path):
    save(tmp_path, state_of(4, seed=1))
    path = save(tmp_path, state_of(9, seed=2))
    for place in (path, str(path), tmp_path):
        params, config = load_params(place)
        assert bits(params) == bits(state_of(9, seed=2).params)
        assert config == CONFIG
    assert int(load_checkpoint(tmp_path)["step"]) == 9


def test_meta_says_what_the_file_is(tmp_path):
    meta = json.loads((save(tmp_path, state_of(4)) / "meta.json").read_text())
    assert (meta["format"], meta["step"], meta["model"]) == (1, 4, MODEL)
    assert len(meta["sha256"]) == 64
    assert meta["version"]


def test_no_module_here_can_execute_what_it_loads():
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    assert "pickle" not in source
    assert "torch.load" not in source


# Which checkpoints there are


def test_only_the_newest_are_kept_and_other_folders_are_left_alone(tmp_path):
    for other in ("step_12", "step_000001_mine", "best", "step_000000.bak"):
        (tmp_path / "checkpoints" / other).mkdir(parents=True)
    for step in (1, 2, 3, 999_999, 1_000_000):
        save(tmp_path, state_of(step), keep=2)
    kept = {"step_999999", "step_1000000"}
    assert set(names(tmp_path)) == kept | {"step_12", "step_000001_mine", "best", "step_000000.bak"}
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_1000000"
    save(tmp_path, state_of(1_000_001), keep=1)
    assert [name for name in names(tmp_path) if checkpoint_files.STEP_FOLDER.fullmatch(name)] == ["step_1000001"]


def test_saving_an_earlier_step_removes_neither_itself_nor_later_ones(tmp_path):
    for step in (50, 60, 5):
        save(tmp_path, state_of(step), keep=2)
    assert names(tmp_path) == ["step_000005", "step_000050", "step_000060"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, state_of(5, seed=1))
    path = save(tmp_path, state_of(5, seed=2))
    assert bits(load_params(path)[0]) == bits(state_of(5, seed=2).params)
    assert names(tmp_path) == ["step_000005"]


def test_no_checkpoint_is_none_or_one_line(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_000007").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    for load in (load_params, load_checkpoint):
        assert complaint(load, tmp_path).startswith(f"{tmp_path}: expected a run folder with checkpoints/step_NNNNNN")


# Whole or not there


def raises(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", [1, 2], ids=["same step again", "next step"])
@pytest.mark.parametrize(
    "broken", ["os.replace", "os.fsync", "training.storage.checkpoint_files.save_file", "json.dumps"]
)
def test_a_write_that_fails_in_the_middle_leaves_only_what_was_there(tmp_path, monkeypatch, broken, step):
    path = save(tmp_path, state_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(broken, raises)
        message = complaint(save, tmp_path, state_of(step, seed=7))
    assert message == (
        f"{tmp_path}/checkpoints/step_{step:06d}: the disk refused it: No space left on device; "
        "free space or choose another --out"
    )
    assert names(tmp_path) == ["step_000001"]
    assert bits(load_checkpoint(path, like=state_of(1))) == bits(state_of(1))


def test_the_checkpoint_of_the_same_step_comes_back_when_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    path = save(tmp_path, state_of(1))
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        return raises() if len(calls) == 2 else replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    complaint(save, tmp_path, state_of(1, seed=7))
    assert names(tmp_path) == ["step_000001"]
    assert bits(load_checkpoint(path, like=state_of(1))) == bits(state_of(1))


def test_an_interrupt_in_the_middle_leaves_nothing_and_passes_through(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, state_of(1))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next_save(tmp_path, monkeypatch):
    save(tmp_path, state_of(1))
    with monkeypatch.context() as patch:  # as if killed before the renaming: neither renamed nor tidied up
        patch.setattr(os, "replace", raises)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        complaint(save, tmp_path, state_of(2))
    assert len(names(tmp_path)) == 2
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_000001"
    save(tmp_path, state_of(3))
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_files_and_folder_reach_the_disk_before_the_new_name_and_the_name_after(tmp_path, monkeypatch):
    events, flush, replace = [], checkpoint_files.flush, os.replace
    monkeypatch.setattr(checkpoint_files, "flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda source, target: (events.append("rename"), replace(source, target)))
    save(tmp_path, state_of(1))
    assert events == ["state.safetensors", "meta.json", ".draft-step_000001", "rename", "checkpoints"]


@pytest.mark.parametrize(
    ("state", "keep"),
    [
        ({"params": {"a": 1.0}, "step": torch.tensor(1)}, 1),
        ({"params": {"a": torch.ones(1)}}, 1),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1), "step": torch.tensor(1)}, 1),
        (state_of(1), 0),
    ],
    ids=["a leaf that is no tensor", "no step", "two leaves of one name", "keep nothing"],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, state, keep):
    with pytest.raises(ValueError, match="save_checkpoint: expected"):
        save(tmp_path, state, keep)
    assert list(tmp_path.iterdir()) == []


# Damage


def rewrite(path: Path, **changes: Any) -> None:
    """Another meta.json, with the checksum that goes with it."""
    meta = json.loads((path / "meta.json").read_text()) | changes
    meta = {key: value for key, value in meta.items() if value is not None and key != "checksum"}
    (path / "meta.json").write_text(json.dumps(meta | {"checksum": checkpoint_files.digest(meta)}))


def edit_meta(path: Path, old: str, new: str) -> None:
    text = (path / "meta.json").read_text()
    assert old in text
    (path / "meta.json").write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "state.safetensors", (path / "state.safetensors").stat().st_size // 2)


def not_safetensors(path: Path) -> None:
    (path / "state.safetensors").write_bytes(b"x" * 100)
    rewrite(path, sha256=checkpoint_files.sha256(path / "state.safetensors"))


def no_params(path: Path) -> None:
    save_file({"step": torch.tensor(1)}, path / "state.safetensors")
    rewrite(path, sha256=checkpoint_files.sha256(path / "state.safetensors"))


VERSION = checkpoint_files.version()
ANY, PARAMS = (load_params, load_checkpoint), (load_params,)
DAMAGES = {
    "one bit flipped": (flip, ANY, "state.safetensors: expected SHA-256 "),
    "truncated": (truncate, ANY, "state.safetensors: expected SHA-256 "),
    "no checksum": (lambda path: rewrite(path, sha256=None), ANY, "state.safetensors: expected SHA-256 None, got "),
    "no tensors": (lambda path: (path / "state.safetensors").unlink(), ANY, "state.safetensors: expected a file "),
    "no meta": (lambda path: (path / "meta.json").unlink(), ANY, "meta.json: expected a file "),
    "meta is no JSON": (lambda path: (path / "meta.json").write_text("{"), ANY, "meta.json: expected JSON, got: "),
    "meta is no text": (lambda path: (path / "meta.json").write_bytes(b"\xff"), ANY, "meta.json: expected JSON, got: "),
    "meta is 5": (
        lambda path: (path / "meta.json").write_text("5"),
        ANY,
        "meta.json: expected keys and values, got int; ",
    ),
    "next format": (
        lambda path: rewrite(path, format=2),
        ANY,
        f"meta.json: expected format 1 of version {VERSION}, got 2 of",
    ),
    "no format": (
        lambda path: rewrite(path, format=None),
        ANY,
        f"meta.json: expected format 1 of version {VERSION}, got None",
    ),
    "a size edited": (
        lambda path: edit_meta(path, '"hidden_size": 8', '"hidden_size": 9'),
        ANY,
        "meta.json: expected the checksum of its content, got another: damaged",
    ),
    "the step of another": (
        lambda path: rewrite(path, step=2),
        ANY,
        "meta.json: expected the step of the folder's name",
    ),
    "no model": (lambda path: rewrite(path, model=None), ANY, "meta.json: expected the key model "),
    "no safetensors": (not_safetensors, ANY, "state.safetensors: expected safetensors, got: "),
    "no parameters": (no_params, PARAMS, "state.safetensors: expected tensors called params.*, got none"),
    "a size of 0": (
        lambda path: rewrite(path, model=MODEL | {"hidden_size": 0}),
        PARAMS,
        "meta.json: expected the sizes of a model, got: model.hidden_size: expected 1 or more, got 0",
    ),
    "an unknown size": (
        lambda path: rewrite(path, model=MODEL | {"hiden_size": 3}),
        PARAMS,
        "meta.json: expected the sizes of a model, got: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_that_names_the_file_and_what_to_do(tmp_path, name):
    damage, loaders, text = DAMAGES[name]
    path = save(tmp_path, state_of(1))
    damage(path)
    for load in loaders:
        message = complaint(load, path)
        assert message.startswith(f"{path}/{text}")
        assert "remove this step's folder" in message or "load it with the version" in message


def test_a_state_of_another_model_is_one_line_that_names_the_leaf(tmp_path):
    path, like = save(tmp_path, state_of(1)), state_of(1)
    file = path / "state.safetensors"
    wide = like._replace(params=like.params | {"embed": torch.zeros(5, 6)})
    assert complaint(load_checkpoint, path, wide) == (
        f"{file}: params.embed: expected (5, 6) torch.float32, got (5, 4) torch.float32; "
        "use the sizes in the run's own config.yaml"
    )
    double = like._replace(step=torch.tensor(1.0, dtype=torch.float64))
    assert "step: expected () torch.float64, got () torch.int64" in complaint(load_checkpoint, path, double)
    more = like._replace(params=like.params | {"head": torch.zeros(1)})
    assert f"{file}: expected a tensor called params.head, got none" in complaint(load_checkpoint, path, more)
    fewer = like._replace(params={"layers": like.params["layers"]})
    assert f"{file}: expected no tensor called params.embed, got one" in complaint(load_checkpoint, path, fewer)
