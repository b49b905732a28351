"""The bits of a row are its own: no other row and no place in a tile or a vector changes one, on any build."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import assert_same_bits, seeded
from tiny_onn_func.kernels import build, runtime
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels import step as step_kernels

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
LIBRARY = ("-shared", "-fPIC")
BUILDS = {
    "as here": build.FLAGS,
    "as here, contracted at will": ("-O3", "-march=native", "-ffp-contract=fast", *LIBRARY),
    "AVX2": ("-O3", "-mavx2", "-mfma", *LIBRARY),
    "AVX2 without fused products": ("-O3", "-mavx2", *LIBRARY),
    "plain": ("-O2", *LIBRARY),
}
WIDTHS = st.sampled_from([1, 3, 7, 8, 9, 16, 17, 31, 40, 64, 65])


@pytest.fixture(
    scope="module",
    params=[name if name == "as here" else pytest.param(name, marks=pytest.mark.slow) for name in BUILDS],
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels of one of the builds, which the functions below then call."""
    library_path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    sources = [path for path in build.SOURCES if path.suffix == ".c"]
    subprocess.run(["cc", *BUILDS[request.param], "-o", library_path, *sources, "-lm"], check=True)
    library = runtime.typed(ctypes.CDLL(str(library_path)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward_kernels, step_kernels):
            patch.setattr(module, "loaded", lambda: library)
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def makers(rows: int, inner: int, outer: int) -> dict[str, Callable[[slice], Tensor]]:
    """What each kernel makes of some of the same rows."""
    x, more, grad = drawn(1, rows, inner), drawn(1, rows, inner, seed=1), drawn(rows, inner, seed=2)
    w, turned = drawn(1, 1, inner, outer, seed=3), drawn(1, 1, outer, inner, seed=4).mT
    norm, bias, budget = drawn(1, inner), drawn(1, inner, seed=6), torch.tensor([0.5], dtype=torch.float64)
    labels = torch.randint(inner, (rows,), generator=seeded(7))
    order, ones = torch.randperm(rows, generator=seeded(8)), torch.ones(1, rows, dtype=torch.bool)
    weights, pairs = drawn(rows, 2, seed=9), torch.stack((x[0], more[0]), dim=1)

    def end(span: slice) -> Tensor:
        return torch.tensor([[len(range(rows)[span])]], dtype=torch.int32)

    def combined(span: slice) -> Tensor:
        y = pairs[span].flatten(0, 1)
        return forward_kernels.combined_rows(y, weights[span], torch.arange(len(y)))

    def chosen(span: slice) -> Tensor:
        args = x[:, span], bias, budget, ones[:, span]
        return forward_kernels.choose(*args, slots=min(3, inner), least=1, dynamic=True)[0][0]

    def slopes(span: slice) -> Tensor:
        known = step_kernels.cross_entropy(x[0, span], labels[span])[2:]
        return step_kernels.cross_entropy_grad(weights[span, 0], x[0, span], labels[span], *known)

    return {
        "matmul": lambda span: forward_kernels.matmul([(x[:, span], w)], end(span))[0],
        "transposed": lambda span: forward_kernels.matmul([(x[:, span], turned)], end(span))[0],
        "twice": lambda span: forward_kernels.matmul([(x[:, span], w), (more[:, span], w)], end(span))[0],
        "token_matmul": lambda span: forward_kernels.token_matmul(x, order[None, span], w, end(span))[0],
        "swiglu": lambda span: forward_kernels.swiglu(x[0, span], more[0, span]),
        "swiglu_grad": lambda span: forward_kernels.swiglu_grad(grad[span], x[0, span], more[0, span])[0],
        "scaled_rows": lambda span: forward_kernels.scaled_rows(x[0], weights, order[span]),
        "combined_rows": combined,
        "rms_norm": lambda span: forward_kernels.rms_norm(x[:, span], norm, 1e-6)[0],
        "rms_norm_grad": lambda span: forward_kernels.rms_norm_grad(grad[None, span], x[:, span], norm, 1e-6)[0][0],
        "choose": chosen,
        "cross_entropy": lambda span: torch.stack(
            [t.float() for t in step_kernels.cross_entropy(x[0, span], labels[span])], dim=-1
        ),
        "cross_entropy_grad": slopes,
    }


@given(rows=st.integers(1, 70), inner=WIDTHS, outer=WIDTHS, data=st.data())
@pytest.mark.usefixtures("kernels")
def test_some_rows_have_the_bits_that_they_have_among_all(
    rows: int, inner: int, outer: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, rows - 1))
    span = slice(first, data.draw(st.integers(first + 1, rows)))
    for name, compute in makers(rows, inner, outer).items():
        assert_same_bits({name: compute(span)}, {name: compute(slice(0, rows))[span]})


@given(rows=st.integers(0, 600), inner=WIDTHS, outer=WIDTHS, column=st.integers(0, 64))
@pytest.mark.usefixtures("kernels")
def test_an_outer_product_s_row_and_column_have_the_bits_that_they_have_among_all(
    rows: int, inner: int, outer: int, column: int
) -> None:
    x, grads, end = drawn(1, rows, inner), drawn(1, rows, outer, seed=1), torch.tensor([[rows]], dtype=torch.int32)
    whole, row, column = forward_kernels.outer(x, grads, end), column % inner, column % outer
    assert_same_bits(forward_kernels.outer(x[..., row : row + 1], grads, end), whole[:, :, row : row + 1])
    assert_same_bits(forward_kernels.outer(x, grads[..., column : column + 1], end), whole[..., column : column + 1])


@given(count=st.integers(1, 70), first=st.integers(0, 69))
@pytest.mark.usefixtures("kernels")
def test_a_parameter_is_updated_to_the_bits_that_it_gets_among_others(count: int, first: int) -> None:
    numbers, leaves = torch.full((1, 6), 0.1), [drawn(1, count, seed=seed).abs() for seed in range(4)]
    span = slice(first % count, count)
    whole = step_kernels.adamw([numbers], *([leaf] for leaf in leaves))
    part = step_kernels.adamw([numbers], *([leaf[:, span]] for leaf in leaves))
    for actual, wanted in zip(part, whole, strict=True):
        assert_same_bits(actual[0], wanted[0][:, span])
