"""Default MoE and the k-means router: leaves that are means by expert, against their definitions by loops."""

import pytest
import torch

from tests.helpers import assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import forward
from tiny_onn_func.experts import Rows, apply_w2
from tiny_onn_func.moe import RoutingInputs, moe
from training import HyperParams, hyper_step, state_of
from training.errors import UserError
from training.run.config import PLAIN_MODEL, RunConfig

DEFAULT = tiny_config(num_experts_per_tok=2, default_outputs=True)
KMEANS = tiny_config(num_experts_per_tok=2, routing="kmeans")
BATCH = dict(batch=3, seq=6, left=(0, 2), right=(1,))


def outputs_of(params: dict, config, batch) -> list[dict[tuple[int, int], torch.Tensor]]:
    """By layer: the output of each (token, expert) that is visited."""
    seen: list[dict[tuple[int, int], torch.Tensor]] = []

    def watch(layer: int, hidden: torch.Tensor, w2: torch.Tensor, rows: Rows) -> torch.Tensor:
        y = apply_w2(layer, hidden, w2, rows)
        active = [row for row in range(len(y)) if rows.expert[row] < 4]
        seen.append({(int(rows.token[row]), int(rows.expert[row])): y[row].detach() for row in active})
        return y

    forward(params, batch.input_ids, config, attention_mask=batch.attention_mask, apply_w2=watch)
    return seen


def test_the_mean_output_of_an_expert_follows_its_tokens() -> None:
    params, batch = spread_params(DEFAULT, 1), tiny_batch(DEFAULT, **BATCH)
    old = torch.randn(2, 4, 8, generator=seeded(0), dtype=torch.float64)
    params["layers"]["moe"]["default_output"] = old
    hyper = HyperParams(default_memory=0.7, router_coupling=1.0)
    new = hyper_step(state_of(params, DEFAULT), batch, hyper, DEFAULT)[0].params["layers"]["moe"]["default_output"]
    for layer, outputs in enumerate(outputs_of(params, DEFAULT, batch)):
        for expert in range(4):
            own = [y for (_, e), y in outputs.items() if e == expert]
            wanted = 0.7 * old[layer, expert] + 0.3 * sum(own) / len(own) if own else old[layer, expert]
            assert_close(new[layer, expert], wanted, 1e-10)


def test_experts_that_are_not_visited_count_with_their_mean_output() -> None:
    leaves = {name: leaf[0] for name, leaf in spread_params(DEFAULT, 1)["layers"]["moe"].items()}
    leaves["default_output"] = torch.randn(4, 8, generator=seeded(0), dtype=torch.float64)
    x = torch.randn(7, 8, generator=seeded(1), dtype=torch.float64)
    real = torch.arange(7) != 3
    out, trace = moe(x, leaves, 0, RoutingInputs(real, 0.5, 1.0, None), DEFAULT, apply_w2)
    for token in range(7):
        p, wanted = (x[token] @ leaves["router"]).softmax(0), torch.zeros(8, dtype=torch.float64)
        visited = p.argsort(descending=True)[:2].tolist()
        for expert in range(4):
            gate, up = x[token] @ leaves["w1"][expert], x[token] @ leaves["w3"][expert]
            y = (gate * gate.sigmoid() * up) @ leaves["w2"][expert]
            wanted += p[expert] * (y if expert in visited else leaves["default_output"][expert])
        assert_close(out[token], wanted if real[token] else torch.zeros_like(wanted), 1e-12)
        if real[token]:
            assert_close(trace.weights[token], p[visited], 1e-12)


def test_the_router_learns_about_experts_that_nobody_visits_from_their_mean_output() -> None:
    hyper = HyperParams(router_coupling=1.0, surprise_weight=0.0, router_lr=0.01)
    batch, moved = tiny_batch(DEFAULT, **BATCH), {}
    for config in (DEFAULT, tiny_config(num_experts_per_tok=2)):
        params = spread_params(config, 1)
        leaves = params["layers"]["moe"]
        leaves["router_bias"] = torch.tensor([0.0, 0.0, 0.0, -9.0], dtype=torch.float64).expand(2, 4).clone()
        if config.default_outputs:
            leaves["default_output"] = torch.randn(2, 4, 8, generator=seeded(0), dtype=torch.float64)
        after = hyper_step(state_of(params, config), batch, hyper, config)[0].params["layers"]["moe"]["router"]
        moved[config.default_outputs] = float((after - leaves["router"])[..., 3].abs().max())
    assert moved[True] > 1e-3
    assert moved[False] == 0, "twin: an expert that is not visited has no gradient"


def test_a_k_means_router_moves_to_the_mean_input_of_its_tokens_and_follows_no_gradient() -> None:
    params, batch = spread_params(KMEANS, 1), tiny_batch(KMEANS, **BATCH)
    hyper = HyperParams(kmeans_rate=0.25, router_coupling=1.0, balance_weight=1.0, router_lr=0.1)
    old = params["layers"]["moe"]["router"]
    new = hyper_step(state_of(params, KMEANS), batch, hyper, KMEANS)[0].params["layers"]["moe"]["router"]
    trace = forward(params, batch.input_ids, KMEANS, attention_mask=batch.attention_mask)[1]
    for layer in range(2):
        for token in range(18):
            x, centres = trace.router_inputs[layer, token], old[layer]
            cosine = torch.stack([x @ c / (x.norm() * c.norm()) for c in centres.T])
            assert_close(trace.router_logits[layer, token], cosine * 8**0.5, 1e-4)  # up to the norm's epsilon
        for expert in range(4):
            visited = (trace.active[layer] & (trace.expert_ids[layer] == expert)).any(-1)
            wanted = old[layer, :, expert]
            if visited.any():
                wanted = wanted + 0.25 * (trace.router_inputs[layer, visited].mean(0) - wanted)
            assert_close(new[layer, :, expert], wanted, 1e-10)


def test_a_frozen_k_means_router_stays() -> None:
    state = state_of(spread_params(KMEANS, 1), KMEANS)._replace(step=torch.tensor(5))
    after = hyper_step(state, tiny_batch(KMEANS), HyperParams(freeze_step=5), KMEANS)[0]
    assert_same_bits(after.params["layers"]["moe"]["router"], state.params["layers"]["moe"]["router"])


def test_means_of_all_experts_are_refused_where_experts_are_spread() -> None:
    model = type(PLAIN_MODEL)(**(vars(PLAIN_MODEL) | {"default_outputs": True}))
    with pytest.raises(UserError, match="shard_experts: expected 1 with"):
        RunConfig(model=model, shard_experts=2)
