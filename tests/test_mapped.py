"""Through vmap's wrappers: axes come to the front in the order of the vmaps, and go back where they were."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.func import grad, vmap

from tests.helpers import seeded
from tiny_onn_func.mapped import each_run, over_runs, over_trees, peel, wrap


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (2, 1), (0, 1)])
def test_what_is_peeled_is_wrapped_again_whatever_axes_are_mapped(dims: tuple[int, int]) -> None:
    x, shapes = drawn(2, 3, 4), []

    def again(t: Tensor) -> Tensor:
        plain, axes = peel(t)
        shapes.append((plain.shape, len(axes)))
        return wrap(2 * plain, axes) - t

    outer, inner = dims
    found = vmap(vmap(again, inner, inner), outer, outer)(x)
    assert torch.equal(found, x)
    assert shapes == [((2, 3, 4), 2)]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_runs_of_nested_vmaps_lie_in_front_those_of_the_outer_first(order: tuple[int, int, int]) -> None:
    """One input is mapped by both vmaps, its axes anywhere; one by each; one by none; one is no tensor."""
    both, of_outer, of_inner, of_none = drawn(2, 3, 5), drawn(2, 5, seed=1), drawn(3, 5, seed=2), drawn(5, seed=3)
    seen: list[Any] = []

    def plain(*given: Any) -> tuple[Tensor, ...]:
        seen.append(([tuple(t.shape) for t in given[:-1]], functorch.get_interpreter_stack()))
        a, b, c, d, number = given
        return a + 10 * b + 100 * c + 1000 * d + number, a.sum(dim=-1)

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return over_runs(plain, a, b, c, of_none, 7)

    outer, inner = order.index(0), order.index(1) - (order.index(1) > order.index(0))
    nested = vmap(vmap(function, (inner, None, 0)), (outer, 0, None))
    found = nested(both.permute(order), of_outer, of_inner)
    assert torch.equal(found[0], both + 10 * of_outer[:, None] + 100 * of_inner + 1000 * of_none + 7)
    assert torch.equal(found[1], both.sum(dim=-1))
    assert seen[0][0] == [(6, 5)] * 4
    assert not seen[0][1], "it runs outside of the vmaps"


def test_what_somebody_differentiates_is_left_to_the_transforms() -> None:
    shapes = []

    def cube(t: Tensor) -> tuple[Tensor]:
        shapes.append(tuple(t.shape))
        return (t**3,)

    x = drawn(4, 3)
    for function in (
        lambda x: vmap(grad(lambda t: over_runs(cube, t)[0].sum()))(x),
        grad(lambda x: vmap(lambda t: over_runs(cube, t)[0])(x).sum()),
    ):
        torch.testing.assert_close(function(x), 3 * x**2)
    assert shapes == [(3,), (3,)]


class Pair(NamedTuple):
    first: Any
    second: Any


def test_a_tree_of_runs_gives_another_tree() -> None:
    def function(given: Any) -> Any:
        a, rest = given
        assert a.ndim == rest["b"].ndim == 1 + (a.shape[0] == 6)
        return {"sums": [a + rest["b"] * rest["number"]], "pair": Pair(a.sum(dim=-1), {"b": 2 * rest["b"]})}

    a, b = drawn(2, 3, 5), drawn(3, 5, seed=1)

    def of_one(a: Tensor, b: Tensor) -> Any:
        return over_trees(function, (a, {"b": b, "number": 3}))

    found = vmap(vmap(of_one), (0, None))(a, b)
    assert torch.equal(found["sums"][0], a + 3 * b)
    assert torch.equal(found["pair"].first, a.sum(dim=-1))
    assert torch.equal(found["pair"].second["b"], 2 * b.expand(2, 3, 5))
    assert torch.equal(of_one(a[0, 0], b[0])["sums"][0], a[0, 0] + 3 * b[0])


def test_each_run_of_several_axes_is_one_call_with_the_tensors_of_that_run() -> None:
    x, y = drawn(2, 3, 4, 5), drawn(2, 3, seed=1)

    def of_one(given: Any) -> Tensor:
        x, rest = given
        assert (tuple(x.shape), rest["y"].ndim, rest["name"]) == ((4, 5), 0, "same")
        return (x * rest["y"]).sum(dim=0)

    given = x, {"y": y, "name": "same"}
    assert torch.equal(each_run(of_one, given, 2), (x * y[..., None, None]).sum(dim=2))
    assert torch.equal(each_run(of_one, (x[0, 0], {"y": y[0, 0], "name": "same"}), 0), (x[0, 0] * y[0, 0]).sum(dim=0))
