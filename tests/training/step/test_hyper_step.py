"""One hyper step is what its parts say: two PyTorch optimizers on plain gradients, and metrics counted by loops."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import assert_close, real_tokens, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.kernels import build, decoder
from tiny_onn_func.tree import flatten, stack, unflatten, unstack
from training import Batch, HyperParams, TrainState, hyper_step, init_state, per_token_surprise
from training.step import main_pass

CONFIG = tiny_config(num_experts_per_tok=3)
HYPER = HyperParams(
    lr=0.02, router_lr=0.03, weight_decay=0.3, max_grad_norm=0.05, warmup_steps=3, total_steps=9, min_lr_ratio=0.1,
    balance_weight=0.4, z_weight=0.2, bias_speed=0.01,
)  # fmt: skip
ROUTER, BIAS = "layers.moe.router", "layers.moe.router_bias"


def a_state(config: ModelConfig) -> TrainState:
    fresh = init_state(config, torch.Generator().manual_seed(0))
    params = spread_params(config, router_gain=3.0)
    moments = [opt._replace(mu=as_double(opt.mu), nu=as_double(opt.nu)) for opt in (fresh.expert_opt, fresh.router_opt)]
    return TrainState(params, *moments, fresh.step)


def as_double(tree: Any) -> Any:
    return unflatten({name: leaf.double() for name, leaf in flatten(tree).items()})


def a_batch(seed: int) -> Batch:
    """Padding on both sides; the last row predicts nothing, so all of its tokens tie at surprise 0."""
    batch = tiny_batch(CONFIG, 4, 6, seed, left=(0, 2), right=(1,), unlabelled=0.2)
    labels = batch.labels.clone()
    labels[-1] = -100
    return batch._replace(labels=labels)


class PlainLoop:
    """The same training as one would write it with `torch.optim` and a loss that is a mean."""

    def __init__(self, params: Any, hyper: HyperParams) -> None:
        self.hyper, self.step = hyper, 0
        self.params = {name: leaf.clone().requires_grad_(name != BIAS) for name, leaf in flatten(params).items()}
        trained = {name: leaf for name, leaf in self.params.items() if name not in (ROUTER, BIAS)}
        self.fast = list(trained.values())
        kinds = {True: [], False: []}
        for name, leaf in trained.items():
            kinds[not name.endswith("norm")].append(leaf)
        groups = [
            {"params": kinds[True], "weight_decay": hyper.weight_decay},
            {"params": kinds[False], "weight_decay": 0},
        ]
        options = {"betas": (hyper.beta1, hyper.beta2), "eps": hyper.eps}
        self.adamw = torch.optim.AdamW(groups, lr=hyper.lr, **options)
        self.router_adamw = torch.optim.AdamW([self.params[ROUTER]], lr=hyper.router_lr, weight_decay=0, **options)

    def train(self, batch: Batch) -> dict[str, float]:
        """One step; what it measured on the way."""
        hyper, before = self.hyper, unflatten({name: leaf.detach() for name, leaf in self.params.items()})
        logits, trace = forward(unflatten(self.params), batch.input_ids, CONFIG, attention_mask=batch.attention_mask)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        surprise = per_token_surprise(before, batch, CONFIG, hyper)
        router, metrics = self.router_objective(trace, surprise, real_tokens(batch))
        self.adamw.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.fast, hyper.max_grad_norm)
        self.params[ROUTER].grad = torch.autograd.grad(router, self.params[ROUTER])[0]
        router_norm = torch.nn.utils.clip_grad_norm_([self.params[ROUTER]], hyper.max_grad_norm)
        rate = self.rate()
        for optimizer, peak in ((self.adamw, hyper.lr), (self.router_adamw, hyper.router_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        self.sink_the_used(trace)
        self.step += 1
        return metrics | {
            "main_loss": loss.item(), "grad_norm": grad_norm.item(), "router_grad_norm": router_norm.item(),
            "lr": hyper.lr * rate,
        }  # fmt: skip

    def rate(self) -> float:
        """Warm-up, then cosine, of the step about to be made."""
        progress = (self.step - self.hyper.warmup_steps) / (self.hyper.total_steps - self.hyper.warmup_steps)
        low = self.hyper.min_lr_ratio
        cosine = low + (1 - low) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
        return min(1.0, (self.step + 1) / self.hyper.warmup_steps) * cosine

    def router_objective(self, trace: Any, surprise: Tensor, real: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The router's loss token by token, and what the step should say of it."""
        terms, hits, chances, tied, z, balance = [], [], [], 0, [], torch.zeros((), dtype=torch.float64)
        for layer in range(CONFIG.num_hidden_layers):
            logits = trace.router_inputs[layer] @ self.params[ROUTER][layer]
            counts = torch.zeros(CONFIG.num_experts, dtype=torch.float64)
            for token in real.nonzero().flatten().tolist():
                finite = surprise[layer, token].isfinite()
                counts += finite
                z.append(logits[token].logsumexp(0) ** 2)
                values = surprise[layer, token][finite]
                if values.max() == values.min():
                    tied += 1
                    continue
                target = surprise[layer, token].argmin()
                shares = F.one_hot(target, CONFIG.num_experts).to(logits.dtype)
                if self.hyper.target_temperature:
                    width = self.hyper.target_temperature * values.mean()
                    shares[finite] = (-values / width).softmax(0)
                terms.append(-(shares * logits[token].log_softmax(0)).sum())
                hits.append(float(logits[token].argmax() == target))
                chances.append(1 / len(values))
            mean_p = logits[real].softmax(-1).mean(0)
            balance = balance + CONFIG.num_experts * (counts / counts.sum() * mean_p).sum() / CONFIG.num_hidden_layers
        mean = torch.stack(terms).mean()
        total = mean * self.hyper.surprise_weight + self.hyper.balance_weight * balance
        total = total + self.hyper.z_weight * torch.stack(z).mean()
        metrics = {
            "router_loss": mean.item(), "balance_loss": balance.item(), "z_loss": torch.stack(z).mean().item(),
            "gating_acc": sum(hits) / len(hits), "gating_trivial": sum(chances) / len(chances),
            "tie_rate": tied / (int(real.sum()) * CONFIG.num_hidden_layers),
        }  # fmt: skip
        return total, metrics

    def sink_the_used(self, trace: Any) -> None:
        for layer in range(CONFIG.num_hidden_layers):
            visits = trace.expert_ids[layer][trace.active[layer]].bincount(minlength=CONFIG.num_experts).double()
            self.params[BIAS][layer] += self.hyper.bias_speed * (visits.mean() - visits).sign()


@pytest.mark.parametrize(
    "hyper",
    [HYPER, HYPER._replace(max_grad_norm=1e6), HYPER._replace(target_temperature=0.5)],
    ids=["clipped", "not clipped", "soft targets"],
)
def test_steps_equal_two_torch_optimizers_on_plain_gradients(hyper: HyperParams) -> None:
    state = a_state(CONFIG)
    loop = PlainLoop(state.params, hyper)
    for seed in range(5):
        batch = a_batch(seed)
        wanted = loop.train(batch)
        state, metrics = hyper_step(state, batch, hyper, CONFIG)
        for name, value in wanted.items():
            assert float(getattr(metrics, name)) == pytest.approx(value, rel=1e-6), name
        assert wanted["tie_rate"] > 0
        for name, leaf in flatten(state.params).items():
            assert_close(leaf, loop.params[name].detach(), 1e-6, f"step {seed}, {name}")
    assert int(state.step) == int(state.expert_opt.updates) == int(state.router_opt.updates) == 5


@pytest.mark.parametrize("what", ["no targets", "all padding"])
def test_a_batch_that_predicts_nothing_moves_nothing_and_leaves_every_number_finite(what: str) -> None:
    state, batch = init_state(CONFIG, torch.Generator().manual_seed(0)), a_batch(0)
    batch = batch._replace(labels=torch.full_like(batch.labels, -100))
    if what == "all padding":
        batch = batch._replace(attention_mask=torch.zeros_like(batch.attention_mask))
    after, metrics = hyper_step(state, batch, HyperParams(weight_decay=0.0), CONFIG)
    for name, leaf in flatten(after.params).items():
        assert torch.equal(leaf, flatten(state.params)[name]), name
    for name, value in metrics._asdict().items():
        assert value.isfinite().all(), name
    assert float(metrics.main_loss) == float(metrics.router_loss) == float(metrics.surprise) == 0.0


def test_a_label_on_padding_is_no_target() -> None:
    state, batch = a_state(CONFIG), a_batch(0)
    padding = batch.attention_mask == 0
    labelled = batch._replace(labels=torch.where(padding, 7, batch.labels))
    assert not torch.equal(labelled.labels, batch.labels)
    after, metrics = hyper_step(state, labelled, HYPER, CONFIG)
    expected, expected_metrics = hyper_step(state, batch, HYPER, CONFIG)
    for actual, wanted in zip(tree_leaves((after, metrics)), tree_leaves((expected, expected_metrics)), strict=True):
        assert torch.equal(actual, wanted)


def test_per_token_surprise_never_explores() -> None:
    state, batch = a_state(CONFIG), a_batch(0)
    surprise = per_token_surprise(state.params, batch, CONFIG, HYPER._replace(explore_prob=1.0))
    assert_close(surprise, per_token_surprise(state.params, batch, CONFIG, HYPER), 0.0)


def test_the_budget_of_the_numbers_decides_dynamic_k() -> None:
    config = tiny_config()
    state, batch = a_state(config), a_batch(0)
    low, high = (hyper_step(state, batch, HYPER._replace(pi_alpha=budget), config)[1] for budget in (0.01, 1.0))
    assert (float(low.avg_k), float(high.avg_k)) == (1.0, config.num_experts)


def test_bfloat16_computes_and_float32_remembers() -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch = tiny_batch(config, 8, 16)
    state = wide = init_state(config, torch.Generator().manual_seed(0))
    for _ in range(20):
        state, low = hyper_step(state, batch, HyperParams(), config, compute_dtype=torch.bfloat16)
        wide, high = hyper_step(wide, batch, HyperParams(), config)
        assert float(low.main_loss) == pytest.approx(float(high.main_loss), rel=0.02)
    for leaf in flatten(state.params).values():
        assert leaf.dtype == torch.float32
    assert low.expert_surprise.dtype == low.router_loss.dtype == torch.float32
    assert float(low.tie_rate) < 0.05, "norms are taken in float32"


def test_bfloat16_runs_side_by_side_equal_the_runs_alone() -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch = tiny_batch(config, 4, 8)
    states = [init_state(config, torch.Generator().manual_seed(seed)) for seed in range(2)]
    step = partial(hyper_step, hyper=HyperParams(), config=config, compute_dtype=torch.bfloat16)
    _, mapped = vmap(lambda state: step(state, batch))(stack(states))
    for together, state in zip(unstack(mapped), states, strict=True):
        alone = step(state, batch)[1]
        assert_close(together.main_loss, alone.main_loss, 1e-2)
        assert_close(together.grad_norm, alone.grad_norm, 5e-2)


def test_no_tensor_of_a_step_has_an_entry_for_every_token_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        main_pass, "pass_is_one_kernel", lambda *_: False
    )  # its memory is one tensor, and has its own test
    config = tiny_config(hidden_size=32, moe_intermediate_size=32, num_experts_per_tok=2)
    batch = tiny_batch(config, 8, 16)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        hyper_step(init_state(config, torch.Generator().manual_seed(0)), batch, HyperParams(), config)
    assert max(largest) < batch.input_ids.numel() * 32 * 32 / 4


@pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
def test_the_memory_of_a_whole_pass_grows_with_widths_and_not_with_their_product() -> None:
    def room(width: int, tokens: int) -> int:
        config = tiny_config(hidden_size=width, moe_intermediate_size=width, num_experts_per_tok=2)
        return decoder._plan(config, (), 1, 1, tokens, "norms", 1).room

    per_token = [(room(width, 96) - room(width, 64)) / 32 for width in (64, 128, 256)]
    assert per_token[2] - per_token[1] < 2.2 * (per_token[1] - per_token[0])


def test_help_says_what_every_number_means() -> None:
    assert len(HyperParams._fields) == 37
    for name in HyperParams._fields:
        text = getattr(HyperParams, name).__doc__
        assert text[0].isupper() or text[0] in "+1"
        assert "Alias for field" not in text
