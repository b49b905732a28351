"""What is exactly 0, tied, or no number: the kernels' part of the rules that all ways of computing share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import seeded, tiny_config
from tiny_onn_func.kernels import build, forward, step
from training import Batch, HyperParams, hyper_step, init_state, per_token_surprise

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
LEAST = torch.finfo(torch.float32).min
TINY = torch.finfo(torch.float32).tiny


def attended(scores: list[float], hidden: list[bool]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of the last query, whose keys have these scores: values, log of the sum, and gradients of all that it takes."""
    seq, size = len(scores), 1e19  # scores up to 1e38 of factors that are no larger
    q = torch.full((1, 1, 1, seq, 1), size)
    k, v = (torch.tensor(scores) / size).view(1, 1, seq, 1), 1 + torch.arange(seq).float().view(1, 1, seq, 1)
    bias = torch.where(torch.tensor(hidden), LEAST, 0.0).expand(1, seq, seq)
    out, log_sums = forward.attention(q, k, v, bias)
    upstream = torch.zeros_like(out)
    upstream[:, -1] = 1
    return out[0, -1].flatten(), log_sums[0, 0, 0, -1], forward.attention_grad(q, k, v, bias, out, log_sums, upstream)


@pytest.mark.parametrize("score", [-3e38, -1e30, -100.0, 0.0])
def test_a_masked_key_gets_exactly_nothing_however_low_the_others_are(score: float) -> None:
    out, _, (_, k, v) = attended([0.0, score, 3e38, score], [True, False, True, False])
    assert out.tolist() == [3.0]  # the mean of 2 and 4
    assert [slope[0, 0, place].item() for slope in (k, v) for place in (0, 2)] == [0.0] * 4
    assert all(v[0, 0, place].item() > 0 for place in (1, 3))


@pytest.mark.parametrize("seq", [1, 7, 8, 17])
def test_a_query_without_any_key_gets_zeros_and_sends_zeros_back(seq: int) -> None:
    out, log_sum, slopes = attended([1.0] * seq, [True] * seq)
    assert (out.item(), log_sum.item()) == (0.0, -math.inf)
    assert all(not slope.any() for slope in slopes)


def test_a_masked_score_that_is_no_number_is_hidden_and_a_visible_one_is_not() -> None:
    for score in (math.nan, math.inf, -math.inf):
        hidden, visible = (attended([score, 0.0, 1e19], [masked, False, False]) for masked in (True, False))
        assert hidden[0].tolist() == [3.0]
        assert hidden[1].item() == pytest.approx(1e19)
        assert visible[0].isnan().all() == visible[1].isnan() == (score != -math.inf)


@pytest.mark.parametrize("seq", [2, 9, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_reaches_only_the_queries_that_see_it(seq: int, bad: float) -> None:
    q, k, v = (torch.randn(1, 1, *shape, generator=seeded(0)) for shape in ((2, seq, 17), (seq, 17), (seq, 17)))
    bias = torch.zeros(1, seq, seq).masked_fill(torch.ones(seq, seq).triu(1) > 0, LEAST)
    at = seq // 2
    bias[:, -1, at] = LEAST
    clean = forward.attention(q, k, v, bias)[0]
    v[..., at, :] = bad
    out = forward.attention(q, k, v, bias)[0]
    sees = bias[0, :, at] == 0
    assert (~out.isfinite()).all(dim=(0, 2, 3, 4)).tolist() == sees.tolist()
    assert torch.equal(out[:, ~sees], clean[:, ~sees]), "and leaves the others' bits"


@pytest.mark.parametrize("score", [0.0, 3.7, -2e8, 1e30])
def test_the_only_key_of_a_query_has_exactly_no_gradient(score: float) -> None:
    """A token that is a document, or a row, of its own: its softmax is 1 whatever q and k are."""
    q, k, v = (torch.randn(1, 1, *shape, generator=seeded(1)) for shape in ((3, 11, 16), (11, 16), (11, 16)))
    q, k = q.abs() * (abs(score) ** 0.5 + 1), k.abs() * (abs(score) ** 0.5 + 1) * math.copysign(1.0, score)
    bias = torch.full((1, 11, 11), LEAST)
    bias.diagonal(dim1=1, dim2=2).zero_()
    out, log_sums = forward.attention(q, k, v, bias)
    upstream = torch.randn(out.shape, generator=seeded(2))
    grad_q, grad_k, _ = forward.attention_grad(q, k, v, bias, out, log_sums, upstream)
    assert not grad_q.any()
    assert not grad_k.any()


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6, 1e8, 1e30])
def test_losses_and_gradients_of_large_logits_are_those_of_float64(size: float) -> None:
    logits = torch.tensor([[size, size, 0.0, -size], [0.0, size, -size, size / 2]])
    labels = torch.tensor([0, 3])
    wide = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, labels, reduction="sum").backward()
    losses, _, *known = step.cross_entropy(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-6, atol=0)
    grads = step.cross_entropy_grad(torch.ones(2), logits, labels, *known)
    torch.testing.assert_close(grads, wide.grad.float(), rtol=1e-6, atol=1e-7)
    yes = torch.ones(1, 1, 2, dtype=torch.bool)
    picked, _, _ = step.router_sums(logits[None, None], labels[None, None], yes, yes[0])
    torch.testing.assert_close(picked, wanted.sum().float().view(1, 1), rtol=1e-6, atol=0)


def test_a_share_that_would_be_next_to_nothing_is_nothing() -> None:
    out, _, (_, _, v) = attended([-200.0, 0.0], [False, False])
    assert out.tolist() == [2.0]
    assert v.flatten().tolist() == [0.0, 1.0]
    logits = torch.tensor([[[0.0, -200.0, -90.0]]])
    args = logits, torch.zeros(1, 3), torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    weights, ids, _ = forward.choose(*args, slots=3, least=1, dynamic=False)
    assert (weights.flatten().tolist(), ids.flatten().tolist()) == ([1.0, 0.0, 0.0], [0, 2, 1])


def test_the_gate_s_ends_are_those_of_pytorch() -> None:
    gate = torch.tensor([-math.inf, -1000.0, -89.0, -0.0, 0.0, 89.0, 1000.0, math.inf, math.nan])
    wanted = torch.nn.functional.silu(gate)
    torch.testing.assert_close(forward.swiglu(gate, torch.ones(9)), wanted, rtol=1e-6, atol=0, equal_nan=True)


def tied(*surprise: float, sign: float = 1.0) -> tuple[bool, bool, int]:
    args = torch.tensor([[[[*surprise]]]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1), torch.full((1,), sign)
    expert, informative, ties = step.least_surprised(*args)
    return bool(ties), bool(informative), int(expert)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("size", [1e-37, 1e-10, 1.0, -1.0, 1e10, 3e38])
def test_a_token_is_tied_iff_its_values_are_equal_but_for_a_share_of_their_size(size: float, sign: float) -> None:
    near, far = size * (1 + 0.9 * step.TIE_TOLERANCE), size * (1 + 1.1 * step.TIE_TOLERANCE)
    assert tied(size, near, math.inf, sign=sign)[:2] == (True, False)
    assert tied(size, far, math.inf, sign=sign)[:2] == (False, True)
    assert tied(size, -size, sign=sign)[:2] == (False, True)


def test_what_is_below_the_smallest_normal_number_is_nothing() -> None:
    assert tied(1e-39, 0.0, 9e-39) == (True, False, 0)
    assert tied(math.inf, 1e-39, -1e-45) == (True, False, 1)
    assert tied(1e-39, 0.0, 1.0) == (False, True, 0)  # two nothings: the first
    assert tied(2 * TINY, 1e-39) == (False, True, 1)


def test_a_lone_candidate_is_no_tie() -> None:
    assert tied(math.inf, 0.0, math.nan) == (False, True, 1)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=20))
def test_the_most_probable_token_is_the_argmax_of_pytorch(row: list[float]) -> None:
    logits = torch.tensor([row])
    assert step.cross_entropy(logits, torch.tensor([0]))[2].tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("kind", ["w2", "unweighted", "experts", "input", "benefit"])
def test_tokens_of_a_document_without_targets_have_no_surprise_and_teach_nothing(kind: str) -> None:
    config = tiny_config(num_experts=8)
    state, mask = init_state(config, seeded(0)), torch.tensor([[1] * 4 + [2] * 4 + [3] * 4] * 2)
    ids, labels = (torch.randint(config.vocab_size, (2, 12), generator=seeded(seed)) for seed in (1, 2))
    batch, hyper = Batch(ids, labels.masked_fill(mask < 3, -100), mask), HyperParams(pi_alpha=1.0)
    of_others = per_token_surprise(state.params, batch, config, hyper, kind=kind).view(-1, 2, 12, 8)[:, :, :8]
    assert not of_others.any()
    assert float(hyper_step(state, batch, hyper, config, kind=kind)[1].tie_rate) == pytest.approx(2 / 3)
