"""Nested dicts of tensors: round trips of flatten, stack and partition as properties."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import assert_same_bits, configs, seeded
from tiny_onn_func import init_params
from tiny_onn_func.tree import (
    ROUTER_LEAVES,
    Tree,
    flatten,
    leaves,
    merge,
    partition,
    stack,
    tree_map,
    unflatten,
    unstack,
    walk,
)

KEYS = st.sampled_from(["a", "b", "w1", "norm", "router_norm", *sorted(ROUTER_LEAVES)])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


NUMBERED = SHAPES.map(numbered)


def trees(leaf: st.SearchStrategy = NUMBERED) -> st.SearchStrategy[Tree]:
    """Nested dicts, up to three deep, every dict with a key at least."""
    inner = st.recursive(leaf, lambda below: st.dictionaries(KEYS, below, min_size=1, max_size=3), max_leaves=8)
    return st.dictionaries(KEYS, inner, min_size=1, max_size=4)


class Pair(NamedTuple):
    """A structure that is not a dict."""

    first: Any
    second: Any


def dict_nodes(tree: Any) -> int:
    return 1 + sum(dict_nodes(child) for child in tree.values()) if isinstance(tree, dict) else 0


@given(trees())
def test_unflatten_undoes_flatten_and_keeps_the_very_leaves_in_order(tree: Tree) -> None:
    flat = flatten(tree)
    back = unflatten(flat)
    assert [id(leaf) for leaf in leaves(tree)] == [id(leaf) for leaf in flat.values()]
    assert list(flatten(back)) == list(flat)
    assert all(flatten(back)[name] is leaf for name, leaf in flat.items())
    assert dict_nodes(back) == dict_nodes(tree)


@given(trees())
def test_flatten_names_a_leaf_by_the_path_that_leads_to_it(tree: Tree) -> None:
    for name, leaf in flatten(tree).items():
        node = tree
        for key in name.split("."):
            node = node[key]
        assert node is leaf
    assert list(flatten(tree)) == [name for name, _ in walk(tree)]


@given(trees(), st.integers(1, 4))
def test_unstack_undoes_stack(tree: Tree, runs: int) -> None:
    same = [tree_map(lambda leaf, run=run: leaf + run, tree) for run in range(runs)]
    stacked = stack(same)
    assert {name: leaf.shape for name, leaf in walk(stacked)} == {n: (runs, *leaf.shape) for n, leaf in walk(tree)}
    back = unstack(stacked)
    assert len(back) == runs
    for ours, theirs in zip(back, same, strict=True):
        assert_same_bits(ours, theirs)


def test_stack_and_unstack_keep_named_tuples_and_make_tensors_of_numbers() -> None:
    stacked = stack([Pair(1.5, {"x": torch.ones(2)}), Pair(2.5, {"x": torch.zeros(2)})])
    assert isinstance(stacked, Pair)
    assert stacked.first.tolist() == [1.5, 2.5]
    assert stacked.second["x"].shape == (2, 2)
    assert [type(run) for run in unstack(stacked)] == [Pair, Pair]


def test_stack_refuses_no_tree_at_all() -> None:
    with pytest.raises(ValueError, match="stack: expected at least one tree, got none"):
        stack([])


@given(trees())
def test_merge_undoes_partition_and_no_leaf_is_in_both(tree: Tree) -> None:
    fast, router = (flatten(part) for part in partition(tree))
    assert not fast.keys() & router.keys()
    assert {name.rsplit(".", 1)[-1] for name in router} <= ROUTER_LEAVES
    assert not {name.rsplit(".", 1)[-1] for name in fast} & ROUTER_LEAVES
    whole = flatten(merge(*partition(tree)))
    assert whole.keys() == flatten(tree).keys()
    assert all(whole[name] is leaf for name, leaf in flatten(tree).items())


@given(configs())
def test_the_router_of_a_model_is_its_matrix_and_its_bias(config: Any) -> None:
    params = init_params(config, seeded(0))
    fast, router = partition(params)
    assert set(flatten(router)) == {"layers.moe.router", "layers.moe.router_bias"}
    assert len(flatten(fast)) == len(flatten(params)) - 2
    assert_same_bits(dict(sorted(flatten(merge(fast, router)).items())), dict(sorted(flatten(params).items())))


@given(trees())
def test_tree_map_visits_every_leaf_once_with_its_partners(tree: Tree) -> None:
    pairs: list[tuple[Tensor, Tensor]] = []
    doubled = tree_map(lambda leaf: leaf * 2, tree)
    tree_map(lambda left, right: pairs.append((left, right)), tree, doubled)
    assert [id(left) for left, _ in pairs] == [id(leaf) for leaf in leaves(tree)]
    assert all(torch.equal(left * 2, right) for left, right in pairs)


def test_walk_names_fields_of_named_tuples_and_places_of_sequences() -> None:
    tree = Pair({"a": 1}, [2, (3,)])
    assert list(walk(tree)) == [("first.a", 1), ("second.0", 2), ("second.1.0", 3)]
