"""Many processes make the step of one: data parallel, optimizer states shared out, experts spread, and all of it."""

import fcntl

import pytest
import torch

from tests.helpers import assert_close
from tests.processes import CASES, FIXED, STEPS, alone, spawn
from tiny_onn_func.tree import flatten, partition, walk
from training.expert_parallel import ROWS, SIZES, SURPRISE
from training.hyper_step import init_state
from training.shards import fast_shapes, from_vectors, joined_shares, named_shares, share_of, to_vectors

STATE, METRICS = 1e-12, 3e-7  # relative, in float64; some metrics are counted in float32
CASE = [(size, *case) for size, cases in CASES.items() for case in cases]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory):
    """(size, trick, layout, rank) -> what that process had in the end; every size runs once for all workers."""
    home = tmp_path_factory.getbasetemp().parent / "distributed"
    home.mkdir(exist_ok=True)

    def result(size: int, trick: str, layout: str, rank: int):
        folder = home / str(size)
        with (home / f"{size}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                spawn(folder, size)
        return torch.load(folder / f"{trick} {layout} {rank}.pt", weights_only=False)

    return result


@pytest.mark.parametrize(("size", "trick", "layout"), CASE)
def test_many_processes_make_the_step_of_one(results, size: int, trick: str, layout: str) -> None:
    """Uneven padding, uneven targets, a row without any; three steps of every kind of rule."""
    state, metrics = alone(trick)
    for rank in range(size):
        found, measured, _ = results(size, trick, layout, rank)
        if trick == "bfloat16":  # every product is rounded, and the rows are multiplied in other company
            assert_close(measured[0].main_loss, metrics[0].main_loss, 1e-2)
            assert_close(measured[0].grad_norm, metrics[0].grad_norm, 5e-2)
            continue
        for name, leaf in walk(state):
            assert_close(dict(walk(found))[name].double(), leaf.double(), STATE, f"rank {rank}, {name}")
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


def test_shared_optimizer_states_send_no_more_than_replicated_ones(results) -> None:
    """A scattered sum and a gather are what a sum is made of."""
    shared, replicated = (results(4, "plain", layout, 0)[2] for layout in ("optimizer", "data"))
    gradients = replicated["gradients"] + replicated["gradients of experts"]
    assert shared["gradients"] + shared["gradients of experts"] == gradients // 2
    assert shared["parameters"] == gradients // 2


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shares_of_a_tree_make_the_tree_again(parts: int) -> None:
    fast, _ = partition(init_state(FIXED, torch.Generator().manual_seed(0)).params)
    vectors = to_vectors(fast, FIXED)
    pieces = []
    for place in range(parts):
        where = [share_of(len(vector), parts, place) for vector in vectors]
        mine = type(vectors)(*(vector[part] for vector, part in zip(vectors, where, strict=True)))
        tree = named_shares(mine, where[0].start, FIXED)
        assert flatten(tree).keys() <= fast_shapes(FIXED, 1).keys() | {"layers.moe.share"}
        pieces.append(joined_shares(tree))
    again = type(vectors)(*(torch.cat(both) for both in zip(*pieces, strict=True)))
    found = from_vectors(again, FIXED, FIXED.num_experts)
    assert [*flatten(found)] == [*flatten(fast)]
    assert all(torch.equal(flatten(found)[name], leaf) for name, leaf in flatten(fast).items())
