"""Many processes make the step of one: data parallel, optimizer states shared out, experts spread, and all of it."""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, assert_same_bits
from tests.training.distributed.processes import CASES, FIXED, LAYOUTS, SAVED, STEPS, alone, spawn, trained
from tiny_onn_func.tree import flatten, partition, walk
from training.distributed.collectives import Group
from training.distributed.expert_parallel import ROWS, SIZES, SURPRISE
from training.distributed.flat_params import (
    fast_shapes,
    from_vectors,
    joined_shares,
    named_shares,
    share_of,
    to_vectors,
)
from training.distributed.layout import Layout
from training.distributed.sharded_checkpoint import check_whole, gather_sharded, load_sharded, open_sharded
from training.errors import UserError
from training.step.hyper_step import init_state
from training.storage.checkpoint import load_checkpoint
from training.storage.checkpoint_files import digest

STATE, METRICS = 1e-12, 3e-7  # relative, in float64; some metrics are counted in float32
CASE = [
    pytest.param(size, *case, marks=[pytest.mark.slow] * (size > 2)) for size, cases in CASES.items() for case in cases
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory):
    """(size, name) -> what so many processes have left; every size runs once for all workers of a test run."""
    own = tmp_path_factory.getbasetemp()
    home = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "distributed"
    home.mkdir(exist_ok=True)

    def result(size: int, name: str) -> Path:
        for count in (2, 4)[: size // 2]:  # four read what two have saved
            folder = home / str(count)
            with (home / f"{count}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.exists():
                    folder.mkdir()
                    spawn(folder, count)
        return home / str(size) / name

    return result


@pytest.fixture(scope="session")
def results(files):
    """(size, trick, layout, rank) -> state, metrics and bytes of that process in the end."""
    return lambda size, trick, layout, rank: torch.load(files(size, f"{trick} {layout} {rank}.pt"), weights_only=False)


@pytest.mark.parametrize(("size", "trick", "layout"), CASE)
def test_many_processes_make_the_step_of_one(results, size: int, trick: str, layout: str) -> None:
    """Uneven padding, uneven targets, a row without any; three steps of every kind of rule."""
    state, metrics = alone(trick)
    for rank in range(size):
        rank_state, measured, _ = results(size, trick, layout, rank)
        if trick == "bfloat16":  # every product is rounded, and the rows are multiplied in other company
            assert_close(measured[0].main_loss, metrics[0].main_loss, 1e-2)
            assert_close(measured[0].grad_norm, metrics[0].grad_norm, 5e-2)
            continue
        for name, leaf in walk(state):
            root = Tensor.sqrt if ".nu." in name else Tensor.double  # a square's relative error is twice the gradient's
            ours, theirs = root(dict(walk(rank_state))[name].double()), root(leaf.double())
            assert_close(ours, theirs, STATE, f"rank {rank}, {name}")
        for mine, theirs in zip(measured, metrics, strict=True):
            for name, value in theirs._asdict().items():
                assert_close(getattr(mine, name).double(), value.double(), METRICS, f"rank {rank}, {name}")


def test_a_mean_of_the_processes_means_would_be_another_step(results) -> None:
    """The negative twin: the rows differ in targets, so equal weights for the processes would not do."""
    _, metrics = alone("plain")
    losses = [float(m.main_loss) for m in metrics]
    halves = results(2, "plain", "data", 0)[1]
    assert losses == pytest.approx([float(m.main_loss) for m in halves], rel=1e-12)


def test_surprise_costs_one_number_for_every_row_that_travels(results) -> None:
    """Bytes sent by expert parallelism: four rows of width D a routed row, and one number with the last of them."""
    width = FIXED.hidden_size * 8  # bytes of a row in float64
    sent = [results(2, "plain", "experts", rank)[2] for rank in range(2)]
    total = {name: sum(process[name] for process in sent) for name in (ROWS, SURPRISE, SIZES)}
    travelled = total[SURPRISE] / 8
    assert travelled > 0
    assert total[ROWS] == travelled * 4 * width  # inputs, outputs, and the gradients of both
    assert total[SURPRISE] / total[ROWS] == 1 / (4 * FIXED.hidden_size)
    assert total[SIZES] == 2 * STEPS * FIXED.num_hidden_layers * FIXED.num_experts // 2 * 8
    without = results(2, "plain", "data", 0)[2]
    assert not {ROWS, SURPRISE} & without.keys()  # where experts stay, nobody says anything of surprise
    others = {"gradients", "gradient of the router", "sums over tokens"}
    assert {name: sent[0][name] for name in others} == {name: without[name] for name in others}


@pytest.mark.slow
def test_shared_optimizer_states_send_no_more_than_replicated_ones(results) -> None:
    """A scattered sum and a gather are what a sum is made of."""
    shared, replicated = (results(4, "plain", layout, 0)[2] for layout in ("optimizer", "data"))
    gradients = replicated["gradients"] + replicated["gradients of experts"]
    assert shared["gradients"] + shared["gradients of experts"] == gradients // 2
    assert shared["parameters"] == gradients // 2


@pytest.mark.parametrize("layout", SAVED)
def test_a_sharded_checkpoint_of_two_is_read_by_one(files, layout: str) -> None:
    saved = files(2, layout) / "sharded" / f"step_{STEPS:06d}"
    alone = load_sharded(open_sharded(saved), FIXED, Layout(Group(), Group(), Group()))
    assert_same_bits(alone, trained())


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED)
def test_a_sharded_checkpoint_of_two_is_read_by_four(files, layout: str) -> None:
    """Bit for bit, as any layout."""
    for other in LAYOUTS:
        for rank in range(4):
            assert_same_bits(torch.load(files(4, f"{layout} as {other} {rank}.pt"), weights_only=False), trained())


def test_a_sharded_checkpoint_becomes_a_whole_one(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(files(2, "both"), tmp_path / "run")
    with pytest.raises(UserError, match=r"got sharded/step_000003 alone; .* --from-sharded .* only from folders that"):
        check_whole(tmp_path / "run")
    gather_sharded(tmp_path / "run")
    assert_same_bits(load_checkpoint(tmp_path / "run", trained()), trained())
    check_whole(tmp_path / "run")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="got none; its checkpoints are whole already"):
        gather_sharded(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "meta.json"])
def test_a_damaged_sharded_checkpoint_is_refused_in_a_line(files, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "step_000003"
    shutil.copytree(files(2, "both") / "sharded" / copy.name, copy)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(UserError, match="expected a whole sharded checkpoint, got"):
        open_sharded(copy)


class Hostile:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("spelling", ["posix.mkdir", "pathlib.os.mkdir"])
def test_an_index_that_would_run_code_is_refused_before_torch_reads_it(files, tmp_path: Path, spelling: str) -> None:
    """With right checksums, as a stranger would make them."""
    copy, trace = tmp_path / "step_000003", tmp_path / "trace"
    shutil.copytree(files(2, "both") / "sharded" / copy.name, copy)
    hostile = pickle.dumps(Hostile(trace), protocol=4)
    if spelling == "pathlib.os.mkdir":  # through a module that an index may name
        module, name = (b"\x8c" + bytes([len(text)]) + text for text in (b"pathlib", b"os.mkdir"))
        call = pickle.dumps((str(trace),), protocol=4)[2:].split(b"\x95", 1)[-1][8:-1]
        hostile = b"\x80\x04" + module + name + b"\x93" + call + b"R."
    (copy / ".metadata").write_bytes(hostile)
    meta = json.loads((copy / "meta.json").read_text())
    meta.pop("checksum")
    meta["files"][".metadata"] = hashlib.sha256(hostile).hexdigest()
    meta["checksum"] = digest(meta)
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"mkdir; its \.metadata is a pickle, which can run code: only from folders"):
        open_sharded(copy)
    assert not trace.exists()
    pickle.loads(hostile)  # the negative twin: it is hostile indeed
    assert trace.exists()


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shares_of_a_tree_make_the_tree_again(parts: int) -> None:
    fast, _ = partition(init_state(FIXED, torch.Generator().manual_seed(0)).params)
    vectors = to_vectors(fast, FIXED)
    pieces = []
    for rank_info in range(parts):
        where = [share_of(len(vector), parts, rank_info) for vector in vectors]
        mine = type(vectors)(*(vector[part] for vector, part in zip(vectors, where, strict=True)))
        tree = named_shares(mine, where[0].start, FIXED)
        assert flatten(tree).keys() <= fast_shapes(FIXED, 1).keys() | {"layers.moe.share"}
        pieces.append(joined_shares(tree))
    again = type(vectors)(*(torch.cat(both) for both in zip(*pieces, strict=True)))
    joined = from_vectors(again, FIXED, FIXED.num_experts)
    assert [*flatten(joined)] == [*flatten(fast)]
    assert all(torch.equal(flatten(joined)[name], leaf) for name, leaf in flatten(fast).items())
