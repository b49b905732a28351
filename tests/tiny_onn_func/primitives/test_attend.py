"""Attention: its kernel and its formula against each other and against PyTorch, in every transform."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.helpers import assert_close, seeded
from tiny_onn_func.attention import ATTEND, _attend_by_library, attend, attend_reference, causal_bias
from tiny_onn_func.kernels import build
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.primitives.fused import autograd_function

OWN = autograd_function(ATTEND)
WAYS = {"as called": attend, "with its own gradients": lambda *inputs: OWN.apply(*inputs)[0]}
BOTH_WAYS = pytest.mark.parametrize("way", WAYS)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def inputs(
    batch: int, groups: int, share: int, seq: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    q, k, v = (
        drawn(batch, groups, share, seq, dim),
        drawn(batch, groups, seq, dim, seed=1),
        drawn(batch, groups, seq, dim, seed=2),
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


def by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    share = q.shape[2]
    keys, values = (t.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(1, 2), keys, values, attn_mask=bias.unsqueeze(1), scale=1.0)
    return out.view_as(q).movedim(3, 1)


def mask_of(batch: int, seq: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A bias with padding on the right of each row, documents apart, and which queries are real."""
    ends = torch.randint(1, seq + 1, (batch, 1), generator=seeded(seed))
    real = (torch.arange(seq) < ends).long()
    documents = real * (1 + (torch.arange(seq) >= seq // 2).long())
    return causal_bias(documents, seq, torch.device("cpu"), dtype), real


@example(batch=2, groups=2, share=2, seq=33, dim=5, masked=True)
@example(batch=1, groups=1, share=1, seq=1, dim=1, masked=False)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 2), share=st.integers(1, 3), seq=st.integers(1, 70),
    dim=st.sampled_from([1, 4, 16, 17, 32]), masked=st.booleans(),
)  # fmt: skip
def test_values_and_gradients_equal_torchs_attention(
    batch: int, groups: int, share: int, seq: int, dim: int, masked: bool
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        q, k, v = (t.requires_grad_() for t in inputs(batch, groups, share, seq, dim, dtype))
        bias, real = mask_of(batch, seq, dim, dtype)
        if not masked:
            bias, real = causal_bias(None, seq, torch.device("cpu"), dtype), torch.ones(batch, seq, dtype=torch.long)
        upstream = drawn(batch, seq, groups, share, dim, seed=3, dtype=dtype) * real[:, :, None, None, None]
        actual, wanted = OWN.apply(q, k, v, bias)[0], by_torch(q, k, v, bias)
        kept = real[:, :, None, None, None]
        assert_close((actual * kept).detach(), (wanted * kept).detach(), tolerance)
        pairs = zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (actual, wanted)), strict=True)
        for name, (ours, theirs) in zip("qkv", pairs, strict=True):
            size = max(float(theirs.abs().max()), 1.0)
            assert float((ours - theirs).abs().max()) <= 10 * tolerance * size, name


@BOTH_WAYS
def test_gradcheck_gradgradcheck_and_forward_mode(way: str) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(1, 1, 2, 3, 2))
    bias = causal_bias(None, 3, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: WAYS[way](*t, bias), (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: WAYS[way](*t, bias), (q, k, v))


@pytest.mark.parametrize(
    "mapped", [(0, 0, 0, None), (0, None, 0, None), (None, 1, None, None), (0, 0, 0, 0), (1, 0, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("own", [True, False])
@BOTH_WAYS
def test_vmap_equals_a_loop(mapped: tuple[int | None, ...], dtype: torch.dtype, own: bool, way: str) -> None:
    attend = WAYS[way]
    runs, batch, seq = 3, 2, 5
    stacked = [
        torch.stack([inputs(batch, 1, 2, seq, 4, dtype)[i] + 0.1 * run for run in range(runs)]) for i in range(3)
    ]
    biases = torch.stack([mask_of(batch if own else 1, seq, run, dtype)[0] for run in range(runs)])
    tensors = [
        t.movedim(0, dim) if dim is not None else t[0] for t, dim in zip([*stacked, biases], mapped, strict=True)
    ]
    picked = [
        [t[run] if dim is not None else t[0] for t, dim in zip([*stacked, biases], mapped, strict=True)]
        for run in range(runs)
    ]
    assert_close(vmap(attend, mapped)(*tensors), torch.stack([attend(*args) for args in picked]), 1e-6)

    def slope(*t: Tensor) -> Tensor:
        return grad(lambda k: (attend(t[0], k, *t[2:]) ** 2).sum())(t[1])

    assert_close(vmap(slope, mapped)(*tensors), torch.stack([slope(*args) for args in picked]), 1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
@BOTH_WAYS
def test_a_tangent_of_one_input_is_its_difference_quotient(place: int, way: str) -> None:
    tensors, bias = list(inputs(1, 2, 1, 4, 3)), causal_bias(None, 4, torch.device("cpu"), torch.float64)
    tangent = drawn(*tensors[place].shape, seed=9)

    def of_place(t: Tensor) -> Tensor:
        return WAYS[way](*tensors[:place], t, *tensors[place + 1 :], bias)

    _, derivative = jvp(of_place, (tensors[place],), (tangent,))
    step = 1e-6
    quotient = (of_place(tensors[place] + step * tangent) - of_place(tensors[place] - step * tangent)) / (2 * step)
    assert_close(derivative, quotient, 1e-7)


@pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
def test_the_kernels_bits_depend_on_no_thread_and_no_neighbour_and_it_keeps_what_is_no_number() -> None:
    q, k, v = inputs(3, 2, 2, 40, 16, torch.float32)
    bias, _ = mask_of(3, 40, 0, torch.float32)
    out, log_sums = forward_kernels.attention(q, k, v, bias)
    alone = forward_kernels.attention(q[1:2], k[1:2], v[1:2], bias[1:2])
    assert torch.equal(out[1:2], alone[0])
    assert torch.equal(log_sums[1:2], alone[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(forward_kernels.attention(q, k, v, bias)[0], out)
    finally:
        torch.set_num_threads(threads)
    k[1, 0, 0, 0] = torch.nan
    sees = (bias[1, :, 0] == 0).tolist()
    assert forward_kernels.attention(q, k, v, bias)[0][1, :, 0].isnan().all(dim=(-2, -1)).tolist() == sees
    assert any(sees)
    assert not all(sees)


ALL_WAYS = {
    "as called": attend,
    "reference": lambda *inputs: attend_reference(*inputs)[0],
    "library": _attend_by_library,
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("way", ALL_WAYS)
def test_padding_reaches_nobody_whatever_it_is(way: str, bad: float) -> None:
    """Keys and values that are no number, and products that overflow: to +inf or, by another sign, to -inf."""
    q, k, v = inputs(2, 2, 2, 20, 4, torch.float32)
    q = q.abs() * 1e9
    bias, real = mask_of(2, 20, 3, torch.float32)
    clean = ALL_WAYS[way](q, k, v, bias)
    assert (real == 0).any()
    padding = (real == 0)[:, None, :, None]
    out = ALL_WAYS[way](q, *(torch.where(padding, bad, t) for t in (k, v)), bias)
    assert out.isfinite().all()
    assert torch.equal(out, clean)


@pytest.mark.parametrize("way", ["as called", "reference"])
def test_a_later_key_whose_score_is_no_number_gets_exactly_nothing(way: str) -> None:
    """The library's way adds: +inf - inf is none, as the docstring says."""
    q, k, v = inputs(1, 1, 2, 12, 4, torch.float32)
    q, bias = q.abs() * 1e9, causal_bias(None, 12, torch.device("cpu"), torch.float32)
    clean = ALL_WAYS[way](q, k, v, bias)
    for bad in (torch.nan, torch.inf, 1e30):
        k[..., 7, :] = bad
        out = ALL_WAYS[way](q, k, v, bias)
        assert torch.equal(out[:, :7], clean[:, :7])
        assert out[:, 7:].isnan().all()


@pytest.mark.parametrize("score", [1e4, 1e6, 1e8, 1e30])
def test_gradients_at_large_scores_are_those_of_the_reference(score: float) -> None:
    """All scores are equal, so a share is 1 / keys; the logarithm of their sum has no digits beside them."""
    bias = causal_bias(None, 9, torch.device("cpu"), torch.float32)
    shapes = (1, 1, 1, 9, 1), (1, 1, 9, 1)
    q, k = (torch.full(shape, score**0.5) for shape in shapes)
    grads = []
    for way in ("as called", "reference"):
        v = drawn(1, 1, 9, 1, dtype=torch.float32).requires_grad_()
        ALL_WAYS[way](q, k, v, bias).sum().backward()
        grads.append(v.grad)
    assert_close(grads[0], grads[1], 2e-5)


@pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
@pytest.mark.parametrize("at", [1, 7, 16, 31])
def test_later_keys_leave_every_bit_of_earlier_queries_however_large_they_are(at: int) -> None:
    """A largest score that were theirs would let all earlier ones underflow."""
    q, k, v = inputs(1, 1, 2, 33, 8, torch.float32)
    bias = causal_bias(None, 33, torch.device("cpu"), torch.float32)
    huge = [torch.where(torch.arange(33)[:, None] < at, t, 1e4 * t) for t in (k, v)]
    out, log_sums = forward_kernels.attention(q, k, v, bias)
    huge_out, huge_sums = forward_kernels.attention(q, *huge, bias)
    assert torch.equal(huge_out[:, :at], out[:, :at])
    assert torch.equal(huge_sums[..., :at], log_sums[..., :at])
    upstream = drawn(*out.shape, seed=3, dtype=torch.float32) * (torch.arange(33) < at)[:, None, None, None]
    wanted = forward_kernels.attention_grad(q, k, v, bias, out, log_sums, upstream)
    slopes = forward_kernels.attention_grad(q, *huge, bias, huge_out, huge_sums, upstream)
    for slope, expected in zip(slopes, wanted, strict=True):
        assert torch.equal(slope[..., :at, :], expected[..., :at, :])
        assert not slope[..., at:, :].any()


@pytest.mark.parametrize("size", [1.0, 2.0**10, 2.0**50])
def test_gradients_of_tied_scores_of_any_size_share_out_equally(size: float) -> None:
    """All scores are 16 size^2: the logarithm of the softmax's sum that the forward pass saves rounds the sum away."""
    q, k, v = (torch.full((1, 1, *shape, 5, 16), value) for shape, value in (((1,), size), ((), size), ((), 1.0)))
    v.requires_grad_()
    bias = causal_bias(torch.ones(1, 5, dtype=torch.int64), 5, torch.device("cpu"), torch.float32)
    attend(q, k, v, bias).sum().backward()
    expected = sum(torch.cat((torch.full((i + 1,), 1 / (i + 1)), torch.zeros(4 - i))) for i in range(5))
    assert v.grad is not None
    assert_close(v.grad[0, 0], expected[:, None].expand(5, 16), 1e-5, "gradient of the values")
