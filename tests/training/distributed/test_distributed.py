"""Many processes make the step of one: data parallel, optimizer states shared out, experts spread, and all of it."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, assert_same_bits, tiny_config
from tests.training.distributed.processes import (
    CASES,
    FIXED,
    LAYOUTS,
    SAVED,
    SAVED_RULE,
    STEPS,
    alone,
    spawn,
    trained,
    with_a_rule,
)
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import flatten, partition, tree_map, walk
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
        for count in dict.fromkeys((2, size)):  # three and four read what two have saved
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


@pytest.mark.parametrize("layout", SAVED)
def test_a_sharded_checkpoint_goes_from_two_to_three_to_one(files, layout: str) -> None:
    saved = files(3, layout) / "sharded" / f"step_{STEPS:06d}"
    assert len([*saved.glob("*.safetensors")]) == 3
    assert_same_bits(load_sharded(open_sharded(saved), FIXED, Layout(Group(), Group(), Group())), trained())


@pytest.mark.parametrize("size", [2, 3])
def test_the_state_of_a_rule_is_in_a_sharded_checkpoint(files, size: int) -> None:
    """Tables, a count without axes, a boolean."""
    saved = open_sharded(files(size, "rule") / "sharded" / f"step_{STEPS:06d}")
    alone = Layout(Group(), Group(), Group())
    assert_same_bits(load_sharded(saved, FIXED, alone, SAVED_RULE), with_a_rule())
    with pytest.raises(UserError, match="expected no tensor called rule"):
        load_sharded(saved, FIXED, alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED)
def test_a_sharded_checkpoint_of_two_is_read_by_four(files, layout: str) -> None:
    """Bit for bit, as any layout."""
    for other in LAYOUTS:
        for rank in range(4):
            assert_same_bits(torch.load(files(4, f"{layout} as {other} {rank}.pt"), weights_only=False), trained())


def test_a_sharded_checkpoint_becomes_a_whole_one(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(files(2, "both"), tmp_path / "run")
    with pytest.raises(UserError, match=r"got sharded/step_000003 alone; .* --from-sharded --out DIR`$"):
        check_whole(tmp_path / "run")
    gather_sharded(tmp_path / "run")
    assert_same_bits(load_checkpoint(tmp_path / "run", trained()), trained())
    check_whole(tmp_path / "run")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="got none; its checkpoints are whole already"):
        gather_sharded(tmp_path)


MORE_LEAVES = tiny_config(
    num_experts_per_tok=2, ngram_order=3, ngram_buckets=5, value_embeddings=True, token_bias=True,
    shared_expert_intermediate_size=3, default_outputs=True, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("config", [FIXED, MORE_LEAVES], ids=["plain", "every leaf"])
def test_shares_of_a_tree_make_the_tree_again(config: ModelConfig, parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fast, _ = partition(init_state(config, generator).params)
    fast = tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator), fast)  # tables begin at zero
    vectors = to_vectors(fast, config)
    pieces = []
    for rank_info in range(parts):
        where = [share_of(len(vector), parts, rank_info) for vector in vectors]
        mine = type(vectors)(*(vector[part] for vector, part in zip(vectors, where, strict=True)))
        tree = named_shares(mine, where[0].start, config)
        assert flatten(tree).keys() <= fast_shapes(config, 1).keys() | {"layers.moe.share"}
        pieces.append(joined_shares(tree))
    again = type(vectors)(*(torch.cat(both) for both in zip(*pieces, strict=True)))
    joined = from_vectors(again, config, config.num_experts)
    assert [*flatten(joined)] == [*flatten(fast)]
    assert all(torch.equal(flatten(joined)[name], leaf) for name, leaf in flatten(fast).items())
