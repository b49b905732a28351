"""All kinds of surprise from one backward pass, and their rank agreement, against loops and scipy."""

import pytest
import scipy.stats
import torch

from tests.helpers import spread_params, tiny_batch, tiny_config
from training import HyperParams, per_token_surprise
from training.step.surprise import KINDS, MEASURED, SURPRISE_KINDS
from training.study.agreement import RECORDED, VALUES, all_surprises, rank_agreement

UNEVEN = dict(batch=3, seq=6, left=(0, 2, 0), right=(0, 1, 3), unlabelled=0.3)


def test_every_kind_that_is_measured_is_a_value_and_those_that_measure_the_same_are_recorded_once() -> None:
    assert tuple(SURPRISE_KINDS) == KINDS, "the table and the names that settings take"
    assert MEASURED[:5] == ("w2", "unweighted", "experts", "input", "benefit"), "rows of analysis.json, new ones behind"
    assert (*MEASURED, "weight") == VALUES
    assert len(RECORDED) == len(MEASURED) - 1, "w2 and unweighted differ by the weight alone"


@pytest.mark.parametrize("top_k", [-1, 1, 3])
def test_one_pass_gives_what_each_kind_gives_alone(top_k: int) -> None:
    config = tiny_config(num_experts_per_tok=top_k)
    params, batch = spread_params(config, 1), tiny_batch(config, **UNEVEN)
    values, trace = all_surprises(params, batch, config, 0.5)
    for kind in MEASURED:
        alone = per_token_surprise(params, batch, config, HyperParams(), kind=kind)
        torch.testing.assert_close(values[VALUES.index(kind)], alone, rtol=1e-12, atol=1e-300)
    weight = values[VALUES.index("weight")]
    torch.testing.assert_close(weight.gather(-1, trace.expert_ids)[trace.active], trace.weights[trace.active])
    assert torch.equal(weight.isfinite(), values[0].isfinite())


def test_agreement_is_kendalls_tau_b_and_the_share_of_common_lowest_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (2, 2, 12, 5), generator=generator).double()
    active = torch.rand(2, 12, 5, generator=generator) < 0.7
    values[1, 0, 3] = torch.inf  # a token that the second ranking does not know
    taus, same, shares = [], [], []
    for layer in range(2):
        for token in range(12):
            a, b = (values[i, layer, token][active[layer, token]] for i in range(2))
            if len(a) < 2 or a.unique().numel() == 1 or b.unique().numel() == 1 or b.isinf().any():
                continue
            taus.append(scipy.stats.kendalltau(a, b).statistic)
            same.append(float(a.argmin() == b.argmin()))
            shares.append(1 / len(a))
    agreement = rank_agreement(values, active)
    assert 5 < len(taus) < 24
    assert float(agreement.tokens[0, 1]) == len(taus)
    assert float(agreement.tau[0, 1]) == pytest.approx(sum(taus) / len(taus))
    assert float(agreement.top1[0, 1]) == pytest.approx(sum(same) / len(same))
    assert float(agreement.chance[0, 1]) == pytest.approx(sum(shares) / len(shares))
    assert agreement.tau.diagonal().tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(agreement.tau, agreement.tau.mT)


def test_a_ranking_and_its_reverse_disagree_and_single_visits_say_nothing() -> None:
    rising = torch.arange(3.0).expand(1, 4, 3)
    agreement = rank_agreement(torch.stack((rising, -rising)), torch.ones(1, 4, 3, dtype=torch.bool))
    assert (float(agreement.tau[0, 1]), float(agreement.top1[0, 1])) == (-1.0, 0.0)
    alone = rank_agreement(torch.stack((rising, -rising)), torch.tensor([True, False, False]).expand(1, 4, 3))
    assert alone.tau.isnan().all()


def test_w2_ranks_as_weight_times_unweighted_whatever_the_labels_are() -> None:
    config = tiny_config(num_experts_per_tok=3)
    params, batch = spread_params(config, 1), tiny_batch(config, 3, 6)
    other = batch._replace(labels=(batch.labels + 1) % config.vocab_size)
    orders = []
    for case in (batch, other):
        values, trace = all_surprises(params, case, config, 0.5)
        orders.append(values[0].gather(-1, trace.expert_ids))
    assert float(rank_agreement(torch.stack(orders), trace.active).tau[0, 1]) == pytest.approx(1.0)
