"""The scaling simulator says what a hand computes, changes as costs must, and refuses what cannot be."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory.saved import measured, models
from benchmarks.models import LARGE
from benchmarks.scaling.plan import (
    ADAMW_TRAFFIC,
    Cluster,
    Layout,
    Plan,
    bytes_sent,
    communication_of,
    flops_of,
    layouts_of,
    memory_of,
    parameters,
    plan,
    saved_of,
)
from benchmarks.scaling.report import MODELS, best_of_each_kind, main
from tiny_onn_func import ModelConfig
from tiny_onn_func.params import count_params
from training.errors import UserError

MODEL = ModelConfig(10, 4, 2, 2, 1, 2, 3, 8, num_experts_per_tok=2)
DENSE = (
    10 * 4 + 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 2 * 2 + 2 * 4) + 4
)  # embedding; q, k and v, o, head norms, norms; norm
EXPERTS = 2 * 8 * 3 * 4 * 3
ROUTER = 2 * (4 * 8 + 8)
CLUSTER = Cluster()


def a_plan(layout: Layout, gpus: int = 8, cluster: Cluster = CLUSTER) -> Plan:
    return plan(LARGE, cluster, layout, gpus, sequences=8, length=1024)


# By hand --------------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model() -> None:
    assert parameters(MODEL) == (DENSE, EXPERTS, ROUTER)
    assert count_params(MODEL) == DENSE + EXPERTS + ROUTER


def test_bytes_of_two_processes_by_hand() -> None:
    data = bytes_sent(MODEL, Layout(), 2, tokens=6, width=4)
    assert data["gradients"] == 2 * (1 / 2) * 4 * DENSE
    assert data["gradients of experts"] == 4 * EXPERTS
    assert data["gradient of the router"] == 4 * 2 * 4 * 8
    assert data["rows of experts"] == data["surprise of rows"] == 0
    assert data == bytes_sent(MODEL, Layout(1, True), 2, tokens=6, width=4), "ZeRO-1 sends what a ring sends"
    spread = bytes_sent(MODEL, Layout(2), 2, tokens=6, width=4)
    rows = 2 * 6 * 2 / 2  # layers, tokens, K; half of them are for the other
    assert spread["gradients of experts"] == 0
    assert spread["rows of experts"] == rows * 4 * 4 * 4  # four times, D numbers of 4 bytes
    assert spread["surprise of rows"] == rows * 4


def test_surprise_needs_no_message_unless_rows_travel_and_then_one_number_a_row() -> None:
    assert bytes_sent(LARGE, Layout(1, True), 64, 8192)["surprise of rows"] == 0
    spread = bytes_sent(LARGE, Layout(8), 64, 8192)
    assert spread["surprise of rows"] / spread["rows of experts"] == 4 / (4 * 2 * LARGE.hidden_size)


def test_memory_by_hand() -> None:
    alone = memory_of(MODEL, Layout(), 1, tokens=6, width=4)
    assert alone.weights == 4 * count_params(MODEL)
    assert alone.moments == 8 * count_params(MODEL)
    assert alone.gradients == 4 * (DENSE + EXPERTS)
    assert alone.surprise == 4 * 2 * 6 * 8
    shared = memory_of(MODEL, Layout(4, True), 8, tokens=6, width=4)
    assert shared.weights == 4 * (DENSE + EXPERTS / 4 + ROUTER)
    assert shared.moments == 8 * (DENSE / 8 + EXPERTS / 8 + ROUTER)
    few = memory_of(LARGE, Layout(), 8, tokens=1)
    assert few.peak == 2 * (few.weights + few.moments) + 3 * few.gradients + few.surprise, "the update"
    many = memory_of(LARGE, Layout(), 8, tokens=8192)
    copy = 2 * sum(parameters(LARGE)[:2])
    assert many.peak == many.weights + many.moments + many.gradients + copy + many.activations + many.surprise


def test_times_and_dollars_by_hand() -> None:
    cluster = Cluster(2, 1e-12, 0.5, intra_gb_s=1e-9, inter_gb_s=1e-10, latency_us=1e6, memory_gb_s=1e-9, price=3600)
    alone = plan(MODEL, cluster, Layout(), 1, sequences=3, length=2, width=4)
    active = DENSE + EXPERTS * 2 / 8 + ROUTER
    assert flops_of(MODEL, 6, 2) == 6 * (6 * active + 12 * 2 * 2 * 4)
    assert alone.compute == pytest.approx(flops_of(MODEL, 6, 2) / 0.5 + ADAMW_TRAFFIC * (DENSE + EXPERTS))
    assert (alone.communication, alone.sent) == (0, 0)
    assert alone.dollars(cluster) == pytest.approx(alone.seconds / 6 * 1e9)
    sums = sum(bytes_sent(MODEL, Layout(), 2, 6, 4).values())
    assert communication_of(MODEL, cluster, Layout(), 2, 6, 4) == pytest.approx(sums + 3 * 2)  # rings of two messages
    assert communication_of(MODEL, cluster, Layout(), 4, 6, 4) == pytest.approx(10 * sums * 3 / 2 + 3 * 6)  # outside


def test_an_exchange_beyond_a_machine_is_as_slow_as_the_network() -> None:
    cluster = Cluster(2, intra_gb_s=1e-9, inter_gb_s=1e-10, latency_us=0.0)
    sent = bytes_sent(MODEL, Layout(4), 4, 6, 4)
    rows = sent["rows of experts"] + sent["surprise of rows"]
    rings = sent["gradients"] + sent["gradient of the router"]
    seconds = communication_of(MODEL, cluster, Layout(4), 4, 6, 4)
    assert seconds == pytest.approx(10 * rings + 10 * rows * 2 / 3), "two of three neighbours are on the other machine"


@pytest.mark.parametrize("width", [2, 4])
def test_saved_activations_are_within_a_fifth_of_what_autograd_saves(width: int) -> None:
    for model, batch, length in [*models()][::5]:
        saved_bytes = measured(model, batch, length, torch.bfloat16 if width == 2 else None)
        assert saved_of(model, batch * length, width) == pytest.approx(saved_bytes, rel=0.2)


# As costs must --------------------------------------------------------------------------------------------------------

gpu_counts = st.integers(0, 12).map(lambda n: 2**n)
sizes = st.builds(
    lambda heads, experts, layers, width, inner, k: ModelConfig(
        64, 8 * width, layers, heads, heads, 8, inner, 2**experts, num_experts_per_tok=min(k, 2**experts)
    ),
    *(
        st.integers(1, 4),
        st.integers(0, 6),
        st.integers(1, 5),
        st.integers(1, 20),
        st.integers(1, 99),
        st.integers(1, 8),
    ),
)


@given(sizes, gpu_counts, st.integers(1, 8), st.integers(2, 100))
def test_every_layout_has_positive_costs_and_shared_states_never_take_more_memory_or_time(
    model: ModelConfig, gpus: int, sequences: int, length: int
) -> None:
    for layout in layouts_of(model, gpus):
        costs = plan(model, CLUSTER, layout, gpus, sequences=sequences, length=length)
        assert all(part > 0 and math.isfinite(part) for part in costs.memory)
        assert costs.compute > 0
        assert costs.tokens == gpus * sequences * length
        assert (costs.communication > 0) == (costs.sent > 0) == (gpus > 1)
        if layout.shard_optimizer:
            whole = plan(model, CLUSTER, Layout(layout.experts), gpus, sequences=sequences, length=length)
            assert costs.memory.peak <= whole.memory.peak
            assert costs.seconds <= whole.seconds
            assert costs.sent == whole.sent


@given(sizes, gpu_counts)
def test_more_devices_send_and_cost_no_less_a_token(model: ModelConfig, gpus: int) -> None:
    few, many = (plan(model, CLUSTER, Layout(), size, sequences=2, length=16) for size in (gpus, 2 * gpus))
    assert many.sent > few.sent
    assert many.dollars(CLUSTER) > few.dollars(CLUSTER)
    assert many.memory.peak >= few.memory.peak


@given(sizes, st.sampled_from(["tflops", "utilisation", "memory_gb_s", "intra_gb_s", "inter_gb_s"]), gpu_counts)
def test_a_faster_cluster_is_never_slower_and_its_memory_is_the_same(model: ModelConfig, part: str, gpus: int) -> None:
    faster = replace(CLUSTER, **{part: getattr(CLUSTER, part) * 2})
    for layout in layouts_of(model, gpus)[:6]:
        before, after = (plan(model, c, layout, gpus, sequences=2, length=16) for c in (CLUSTER, faster))
        assert after.seconds <= before.seconds
        assert after.memory == before.memory


@given(sizes, gpu_counts, st.integers(1, 6))
def test_experts_spread_wider_need_less_memory_and_longer_sequences_more(
    model: ModelConfig, gpus: int, sequences: int
) -> None:
    spread = [layout for layout in layouts_of(model, gpus) if not layout.shard_optimizer]
    peaks = [memory_of(model, layout, gpus, sequences * 16).peak for layout in spread]
    assert peaks == sorted(peaks, reverse=True)
    assert memory_of(model, spread[0], gpus, sequences * 32).peak >= peaks[0]


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_and_the_json_have_the_same_plans(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert main(["--gpus", "1", "64", "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(("| 1 ", "| 64 "))]
    report = json.loads(path.read_text(encoding="utf-8"))
    assert len(lines) == len(report["plans"]) == 5, "one device has one layout, many have four kinds"
    assert [row["layout"] for row in report["plans"]][:3] == ["data", "data", "sharded"]
    assert report["parameters"] == count_params(LARGE)
    for line, row in zip(lines, report["plans"], strict=True):
        assert f"| {row['dollars']:,.2f} |" in line


def test_of_each_kind_the_cheapest_that_fits_else_the_smallest() -> None:
    def kind(p: Plan) -> tuple[bool, bool]:
        return p.layout.experts > 1, p.layout.shard_optimizer

    small = replace(CLUSTER, memory_gib=45.0)
    plans = [a_plan(layout, cluster=small) for layout in layouts_of(LARGE, 8)]
    for best in best_of_each_kind(plans, small):
        alike = [p for p in plans if kind(p) == kind(best)]
        if best.fits:
            assert best.dollars(small) == min(p.dollars(small) for p in alike if p.fits)
        else:
            assert best.memory.peak == min(p.memory.peak for p in alike)
            assert not any(p.fits for p in alike)


def test_a_size_may_be_given_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "1", "--model.hidden-size", "64", "--model.num-experts", "8"]) == 0
    assert capsys.readouterr().out.startswith("0.00 billion parameters")
    assert {*MODELS} == {"small", "0.5B", "30B"}


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "--model 7B": "--model: expected one of small, 0.5B, 30B, got '7B'",
        "--gpus 0": "--gpus: expected 1 to 4096, got 0",
        "--gpus 5000": "--gpus: expected 1 to 4096, got 5000",
        "--tflops 0": "--tflops: expected more than 0, got 0.0",
        "--memory-gib nan": "--memory-gib: expected more than 0, got nan",
        "--utilisation 1.5": "--utilisation: expected at most 1, got 1.5",
        "--price -1": "--price: expected 0 or more, got -1.0",
        "--gpus-per-node 0": "--gpus-per-node: expected more than 0, got 0",
        "--sequences 0": "--sequences: expected 1 or more, got 0",
        "--length 1": "--length: expected 2 or more, got 1",
        "--model.num-experts 0": "--model.num-experts: expected 1 or more, got 0",
        "--nodes 3": "nodes",
    }.items(),
)
def test_bad_input_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="experts: expected a divisor of 8 devices"):
        a_plan(Layout(16))
    with pytest.raises(UserError, match=r"experts: expected a divisor of num_experts \(32\), got 3"):
        a_plan(Layout(3), gpus=6)
    with pytest.raises(UserError, match="width: expected 2"):
        plan(LARGE, CLUSTER, Layout(), 1, sequences=1, length=8, width=8)
