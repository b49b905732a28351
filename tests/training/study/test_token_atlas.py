"""Token atlas: moments against loops, omega squared against scipy and against simulations, a study that has one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import f_oneway
from torch import Generator

from tests.training.study.test_runner import MODEL, TEXT, small_study
from tiny_onn_func.tree import stack
from training import init_state, run_study
from training.data.batches import held_out_batches
from training.data.corpus import open_corpus
from training.errors import UserError
from training.run.config import RunConfig
from training.step.batch import IGNORE_INDEX
from training.storage.token_atlas import FILE, Visits, read_atlas, write_atlas
from training.study.agreement import VALUES, all_surprises
from training.study.token_atlas import (
    MOST_TOKENS,
    Moments,
    TokenBenefit,
    add_batch,
    atlas_rows,
    omega_squared,
    token_benefits,
    variance_shares,
)

LAYERS, VOCAB, EXPERTS = 2, 5, 3


def nothing() -> TokenBenefit:
    shapes = ((LAYERS, VOCAB, EXPERTS), (LAYERS, VOCAB))
    return TokenBenefit(*(Moments(*torch.zeros(3, *shape, dtype=torch.float64)) for shape in shapes))


def moments(groups: list[np.ndarray]) -> Moments:
    parts = [(len(x), x.mean(), ((x - x.mean()) ** 2).sum()) for x in groups]
    return Moments(*torch.tensor(parts, dtype=torch.float64).T)


# Moments --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_moments_of_batches_are_those_of_all_values_by_a_loop(seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    found = nothing()
    visits: dict[tuple[int, int, int], list[float]] = {}
    occurrences: dict[tuple[int, int], list[float]] = {}
    for size in sizes:
        values = 1000 + random.standard_normal((LAYERS, size, EXPERTS))
        values[random.random(values.shape) < 0.4] = np.inf
        ids = random.integers(-1, VOCAB, size)
        found = add_batch(found, torch.from_numpy(values), torch.from_numpy(ids))
        for layer in range(LAYERS):
            for token, row in zip(ids.tolist(), values[layer], strict=True):
                known = row[np.isfinite(row)]
                if token >= 0 and known.size:
                    occurrences.setdefault((layer, token), []).append(known.mean())
                    for expert in np.flatnonzero(np.isfinite(row)):
                        visits.setdefault((layer, token, int(expert)), []).append(row[expert])
    for made, wanted in ((found.visits, visits), (found.occurrences, occurrences)):
        assert int(made.number.sum()) == sum(map(len, wanted.values()))
        for place, values in wanted.items():
            assert made.number[place] == len(values)
            assert float(made.mean[place]) == pytest.approx(np.mean(values), abs=1e-9)
            assert float(made.squares[place]) == pytest.approx(np.var(values) * len(values), abs=1e-6)


# Variance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_omega_squared_follows_from_the_f_of_scipy(seed: int) -> None:
    """omega^2 = (k - 1)(F - 1) / ((k - 1)(F - 1) + N)."""
    random = np.random.default_rng(seed)
    groups = [random.normal(random.normal(), 1, int(random.integers(2, 9))) for _ in range(6)]
    n, f = sum(map(len, groups)), f_oneway(*groups).statistic
    assert omega_squared(moments(groups)) == pytest.approx(5 * (f - 1) / (5 * (f - 1) + n), rel=1e-9)
    alone = [*groups, np.array([99.0])]
    assert omega_squared(moments(alone)) == omega_squared(moments(groups)), (
        "one value has no spread, and does not count"
    )


def test_omega_squared_is_none_on_average_where_groups_say_nothing_and_eta_squared_is_not() -> None:
    random = np.random.default_rng(0)
    omegas, etas = [], []
    for _ in range(300):
        groups = [*random.standard_normal((20, 3))]
        of = moments(groups)
        omegas.append(omega_squared(of))
        etas.append(float((of.number * of.mean**2).sum() / ((of.number * of.mean**2).sum() + of.squares.sum())))
    assert abs(np.mean(omegas)) < 0.02
    assert np.mean(etas) > 0.25


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_omega_squared_is_the_share_that_values_were_made_with(share: float) -> None:
    random = np.random.default_rng(1)
    groups = [
        random.normal(random.normal(0, math.sqrt(share)), math.sqrt(1 - share), int(random.integers(2, 40)))
        for _ in range(2000)
    ]
    assert omega_squared(moments(groups)) == pytest.approx(share, abs=0.04)


def test_nothing_that_varies_has_no_share() -> None:
    assert omega_squared(moments([np.array([1.0, 2.0])])) is None
    assert omega_squared(moments([np.array([1.0]), np.array([2.0])])) is None
    assert omega_squared(moments([np.ones(3), np.ones(4)])) is None
    assert variance_shares(nothing()) == {"token": [None] * 2, "token_expert": [None] * 2, "occurrences": 0}


# Runs -----------------------------------------------------------------------------------------------------------------


def test_benefits_of_vmapped_runs_are_those_of_every_token_of_every_run_by_a_loop(text: str) -> None:
    config = RunConfig(data=text, batch_size=2, sequence_length=16, model=MODEL)
    corpus = open_corpus(text, sequence_length=16).held_out
    states = [init_state(MODEL, Generator().manual_seed(seed)).params for seed in (0, 1)]
    found = token_benefits(stack(states), [config, config], corpus, 40)
    for params, made in zip(states, found, strict=True):
        visits: dict[tuple[int, int, int], list[float]] = {}
        seen = 0
        for batch in held_out_batches(corpus, 2, 16, stride=16):
            if seen >= 40:
                break
            values = all_surprises(params, batch, MODEL, 0.5)[0][VALUES.index("benefit")]
            for place, (token, label) in enumerate(zip(batch.input_ids.flatten(), batch.labels.flatten(), strict=True)):
                seen += int(label != IGNORE_INDEX)
                for layer, expert in torch.isfinite(values[:, place]).nonzero().tolist():
                    if label != IGNORE_INDEX:
                        visits.setdefault((layer, int(token), expert), []).append(float(values[layer, place, expert]))
        rows = {(row.layer, row.token_id, row.expert): row for row in atlas_rows(made)}
        assert rows.keys() == visits.keys()
        for place, values in visits.items():
            row = rows[place]
            assert row.visits == len(values)
            assert row.benefit == pytest.approx(np.mean(values), rel=1e-3, abs=1e-7)
            if len(values) > 1:
                assert row.standard_error == pytest.approx(
                    np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-2, abs=1e-7
                )
            else:
                assert row.standard_error is None
        assert variance_shares(made)["occurrences"] == seen


def test_frequent_tokens_and_helpful_experts_come_first() -> None:
    found = add_batch(
        nothing(), torch.tensor([[[3.0, 1.0, math.inf]] * 3] * 2, dtype=torch.float64), torch.tensor([4, 4, 2])
    )
    rows = atlas_rows(found)
    assert [(row.layer, row.token_id, row.expert) for row in rows[:4]] == [(0, 4, 1), (0, 4, 0), (0, 2, 1), (0, 2, 0)]
    assert (rows[0].occurrences, rows[0].visits, rows[0].benefit, rows[0].standard_error) == (2, 2, 1.0, 0.0)
    assert MOST_TOKENS > 257, "every byte has its rows"


def test_a_study_writes_the_atlas_of_every_run_if_it_is_asked(text: str, tmp_path: Path) -> None:
    study = small_study(text, seeds=(0,), atlas_tokens=40)
    run_study(study, tmp_path / "study")
    analysis = json.loads((tmp_path / "study" / "analysis.json").read_text(encoding="utf-8"))
    for arm in analysis["arms"].values():
        shares = arm["routing"]["benefit_variance"]
        assert len(shares["token"]) == len(shares["token_expert"]) == MODEL.num_hidden_layers
        rows = read_atlas(tmp_path / "study" / "runs" / arm["runs"][0])
        assert sum(row.visits for row in rows if row.layer == 0) >= shares["occurrences"]
        assert {row.token for row in rows} <= {*TEXT, "\\n"}
    assert "Token atlas" in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")


def test_the_table_survives_its_file_and_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    rows = [Visits(0, 10, 5, 2, 3, -0.25, 0.125, "\\n"), Visits(1, 44, 1, 0, 1, 0.5, None, ",")]
    assert read_atlas(tmp_path) == []
    write_atlas(rows, {10: "\n", 44: ","}.__getitem__, tmp_path)
    assert read_atlas(tmp_path) == rows
    for damage in ("layer\n0\n", (tmp_path / FILE).read_text(encoding="utf-8").replace("-0.25", "much")):
        (tmp_path / FILE).write_text(damage, encoding="utf-8")
        with pytest.raises(
            UserError, match=r"token_atlas.csv: expected columns layer, token_id.*remove the file"
        ) as caught:
            read_atlas(tmp_path)
        assert "\n" not in str(caught.value)


def test_an_atlas_without_analysis_is_refused() -> None:
    with pytest.raises(UserError, match="atlas_tokens: expected 0 without analysis_tokens, got 9; give both"):
        small_study(analysis_tokens=0, atlas_tokens=9)
