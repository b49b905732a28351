"""Digests keep what pages show, however the records come in, and measures of layers are those of plain loops."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.report.alarms import WINDOW
from training.report.digest import (
    BLOCKS,
    LAYERED,
    Digest,
    empty_digest,
    extend,
    layer_curves,
    mean_curves,
    measures,
    surprise_shares,
    table_at_end,
    tables_over_steps,
)  # fmt: skip


def records(count: int, shape: tuple[int, int] = (2, 4), seed: int = 0) -> list[dict[str, Any]]:
    drawn = np.random.default_rng(seed)
    made = []
    for step in range(1, count + 1):
        load = drawn.dirichlet(np.full(shape[1], 0.3), shape[0])
        load[0, 0] = 0.0
        made.append({
            "step": step, "seconds": step / 10, "main_loss": 5 / step, "expert_load": load.tolist(),
            "target_load": load.tolist(), "expert_surprise": (9 * load).tolist(), "co_activation_layers": [0.25, None],
        })  # fmt: skip
    return made


def digest_of(history: list[dict[str, Any]]) -> Digest:
    return extend(empty_digest(), history)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(0, 2**31))
def test_records_in_pieces_are_the_digest_of_all_of_them(pieces: list[int], seed: int) -> None:
    history = records(sum(pieces), seed=seed)
    digest, start = empty_digest(), 0
    for size in pieces:
        digest, start = extend(digest, history[start : start + size]), start + size
    for got, whole in zip(digest, digest_of(history), strict=True):
        if isinstance(got, np.ndarray):
            np.testing.assert_allclose(got, whole, rtol=1e-12)
        else:
            assert got == whole


def test_tables_are_means_of_blocks_of_records_and_at_the_end_of_the_last_ones() -> None:
    history = records(1000)
    digest = digest_of(history)
    assert BLOCKS <= digest.sums.shape[1] <= 2 * BLOCKS
    loads = np.array([record["expert_load"] for record in history])
    drawn = tables_over_steps(digest, "expert_load", 6)
    assert [step for step, _ in drawn][-1] == 1000
    assert len(drawn) == 6
    first = drawn[0][0]
    assert drawn[0][1] == pytest.approx(loads[:first].mean(axis=0))
    assert table_at_end(digest, "expert_load") == pytest.approx(loads[-WINDOW:].mean(axis=0))
    assert tables_over_steps(empty_digest(), "expert_load", 6) == []
    assert table_at_end(empty_digest(), "expert_load") is None


def test_surprise_is_of_the_records_in_which_an_expert_had_rows() -> None:
    tables = [[[0.0, 2.0, None]], [[0.0, 0.0, None]], [[0.0, 4.0, None]]]
    digest = digest_of([{"step": i, "expert_surprise": table} for i, table in enumerate(tables)])
    end = table_at_end(digest, "expert_surprise")
    assert end == pytest.approx(np.array([[0.0, 3.0, np.nan]]), nan_ok=True)


def test_tables_of_another_shape_are_dropped_and_scalars_stay() -> None:
    digest = extend(digest_of(records(5)), records(3, (1, 2)))
    assert digest.window.shape == (3, 3, 1, 2)
    assert digest.layered.shape == (len(LAYERED), 8, 1)
    assert mean_curves([digest], 99)["main_loss"].y[0] == 5.0


def test_odd_records_do_no_harm() -> None:
    odd = [{}, {"step": "x", "expert_load": "y"}, {"step": None, "main_loss": 1e99, "expert_surprise": [[None]]}]
    curves = mean_curves([digest_of([*odd, {"step": 2, "main_loss": 1.5}])], 9)
    assert (curves["main_loss"].step.tolist(), curves["main_loss"].y.tolist()) == ([2], [1.5])


@given(st.lists(st.dictionaries(st.integers(1, 9), st.floats(-5, 5), max_size=6), min_size=1, max_size=4))
def test_a_curve_is_the_mean_over_the_runs_that_have_the_step(runs: list[dict[int, float]]) -> None:
    digests = [digest_of([{"step": s, "seconds": s / 2, "avg_k": k} for s, k in run.items()]) for run in runs]
    curve = mean_curves(digests, 99)["avg_k"]
    steps = sorted({step for run in runs for step in run})
    means = [np.mean([run[step] for run in runs if step in run]) for step in steps]
    assert curve.step.tolist() == steps
    assert curve.y == pytest.approx(np.array(means, dtype=float), abs=1e-12)
    assert curve.seconds.tolist() == [step / 2 for step in steps]


def test_measures_of_a_layer_are_those_of_plain_loops() -> None:
    load = np.random.default_rng(0).dirichlet(np.full(8, 0.5), 3)
    load[1] = [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    load[2] = 1 / 8
    columns = measures(load)
    for layer, shares in enumerate(load.tolist()):
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(8)
        wanted = [entropy, max(shares) / (sum(shares) / 8) - 1, sum(p == 0 for p in shares)]
        assert [values[layer] for values in columns] == pytest.approx(wanted)
    assert [values[2] for values in columns] == pytest.approx([1, 0, 0])
    assert [values.tolist() for values in measures(np.ones((1, 1)))] == [[1.0], [0.0], [0.0]]
    assert np.isnan(measures(np.full((1, 4), np.nan))).all()


def test_layers_have_their_own_curves() -> None:
    history = [{"step": 3, "expert_load": [[1.0, 0.0], [0.5, 0.5]]}, {"step": 4, "co_activation_layers": [0.25, None]}]
    curves = layer_curves([digest_of(history)], 9)
    assert (curves["MaxVio"].step.tolist(), curves["MaxVio"].y.tolist()) == ([3], [[1], [0]])
    assert curves["co-activation"].y == pytest.approx(np.array([[0.25], [np.nan]]), nan_ok=True)


def test_histograms_are_shares_of_rows_over_bins_that_all_arms_have() -> None:
    half = {"step": 1, "expert_load": [[0.25, 0.75]], "expert_surprise": [[1.0, 100.0]]}
    none = {"step": 1, "expert_load": [[1.0, 0.0]], "expert_surprise": [[0.0, 0.0]]}
    first, second = surprise_shares([[digest_of([half]), digest_of([none])], [digest_of([none])]], bins=2)
    assert first.step == pytest.approx(np.sqrt([10.0, 1000.0]))
    assert (first.y.tolist(), second.y.tolist()) == ([[0.25, 0.75]], [[0.0, 0.0]])
    assert not surprise_shares([[digest_of([none])]])[0].y.size
