"""One scoring loop: models scored together get the scores that each gets alone, from counts that are exact."""

import math

import pytest
import torch

from tests.helpers import seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import forward
from tiny_onn_func.tree import stack
from training import HyperParams, hyper_step, init_state
from training.errors import UserError
from training.run.evaluate import evaluate, evaluate_runs

CONFIG = tiny_config()
BATCHES = [tiny_batch(CONFIG, seed=seed, right=(2, 0), unlabelled=0.2) for seed in range(3)]
BUDGETS = (0.3, 0.5, 0.9)


def test_models_scored_together_get_the_score_that_each_gets_alone() -> None:
    models = [spread_params(CONFIG, seed) for seed in range(3)]
    together = evaluate_runs(stack(models), CONFIG, BATCHES, 40, surprise_budgets=BUDGETS)
    for params, budget, score in zip(models, BUDGETS, together, strict=True):
        alone = evaluate(params, CONFIG, BATCHES, 40, surprise_budget=budget)
        assert score == pytest.approx(alone, rel=1e-12)
        assert (score.tokens, score.avg_k, score.accuracy) == (alone.tokens, alone.avg_k, alone.accuracy)


def test_a_score_is_of_sums_over_all_targets_and_real_tokens() -> None:
    params, nats, visits, real, targets = spread_params(CONFIG), 0.0, 0, 0, 0
    for batch in BATCHES:
        logits, trace = forward(params, batch.input_ids, CONFIG, attention_mask=batch.attention_mask)
        rows = batch.labels.flatten() >= 0
        log_probs = logits.flatten(0, 1).log_softmax(-1)[rows]
        nats -= float(log_probs.gather(1, batch.labels.flatten()[rows, None]).sum())
        visits += int(trace.active[:, batch.attention_mask.flatten() != 0].sum())
        targets, real = targets + int(rows.sum()), real + int(batch.attention_mask.sum())
    score = evaluate(params, CONFIG, BATCHES, 40, surprise_budget=0.5)
    assert score.nats_per_token == pytest.approx(nats / targets, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 40, rel=1e-6)
    assert score.avg_k == visits / (real * CONFIG.num_hidden_layers)
    assert (score.tokens, score.bytes) == (targets, 40)


PADDING = BATCHES[0]._replace(attention_mask=torch.zeros_like(BATCHES[0].attention_mask))


@pytest.mark.parametrize("num_bytes", [0, 40])
@pytest.mark.parametrize(
    "batches", [[], [tiny_batch(CONFIG, unlabelled=1.0)], [PADDING]], ids=["no batch", "no target", "all padding"]
)
def test_nothing_to_score_is_one_line_and_no_perfect_score(batches: list, num_bytes: int) -> None:
    with pytest.raises(UserError, match="held-out text: expected a target to score, got none; give more text"):
        evaluate(spread_params(CONFIG, 1), CONFIG, batches, num_bytes, surprise_budget=0.5)


@pytest.mark.parametrize("budget", [0.0, -1.0, 5.0, math.inf, math.nan])
def test_a_budget_out_of_range_is_refused_though_it_reaches_the_model_as_a_tensor(budget: float) -> None:
    """`forward` looks at Python numbers only: a tensor may be mapped."""
    with pytest.raises(ValueError, match=r"^surprise_budget: expected a number in \(0, 1\], got "):
        evaluate(spread_params(CONFIG), CONFIG, BATCHES, 40, surprise_budget=budget)
    models = stack([spread_params(CONFIG), spread_params(CONFIG, 1)])
    with pytest.raises(ValueError, match=r"^surprise_budget: expected a number in \(0, 1\], got "):
        evaluate_runs(models, CONFIG, BATCHES, 40, surprise_budgets=(0.5, budget))


def test_as_many_budgets_as_models_and_no_negative_number_of_bytes_are_wanted() -> None:
    models = stack([spread_params(CONFIG), spread_params(CONFIG, 1)])
    for budgets in ((0.5,), (0.5, 0.5, 0.5)):
        with pytest.raises(
            ValueError, match=rf"^surprise_budgets: expected one for each of 2 models, got {len(budgets)}"
        ):
            evaluate_runs(models, CONFIG, BATCHES, 40, surprise_budgets=budgets)
    with pytest.raises(ValueError, match=r"^num_bytes: expected the bytes of the text, 1 or more, got -5"):
        evaluate(spread_params(CONFIG), CONFIG, BATCHES, -5, surprise_budget=0.5)


def test_a_budget_keeps_the_experts_in_evaluation_that_it_keeps_in_training() -> None:
    """Equal probabilities, and a budget of whole shares: rounded otherwise it would keep one expert more, or fewer."""
    for experts in (3, 5, 6, 7, 10, 12):
        config = tiny_config(num_experts=experts)
        state = init_state(config, seeded(0))
        state.params["layers"]["moe"]["router"].zero_()
        batch = tiny_batch(config)
        for j in range(1, experts + 1):
            metrics = hyper_step(state, batch, HyperParams(pi_alpha=j / experts), config)[1]
            score = evaluate(state.params, config, [batch], 9, surprise_budget=j / experts)
            assert score.avg_k == float(metrics.avg_k), f"{j} / {experts}"
