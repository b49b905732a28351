"""One wall before the kernels: what is wrong in dtype, shape or range is named in a line, single and mapped."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.helpers import ROOT, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import forward, generate, init_params
from tiny_onn_func.experts import apply_w2, apply_w13
from tiny_onn_func.hashing import hash_logits
from tiny_onn_func.inference.decode import decode, start_decoding
from tiny_onn_func.kernels import runtime
from tiny_onn_func.tree import stack, tree_map
from training import Batch, HyperParams, SurpriseHookManager, hyper_step, init_state, per_token_surprise
from training.step.losses import cross_entropy
from training.step.oracle import counterfactual_losses
from training.step.router_loss import router_loss
from training.step.rules import Targets

CONFIG = tiny_config(num_experts_per_tok=2)
BATCH = tiny_batch(CONFIG, 2, 5)
PARAMS = init_params(CONFIG, seeded(0))


@pytest.fixture(params=["kernels", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute: by kernels where there are any, and without."""
    if request.param == "reference":
        monkeypatch.setattr(runtime, "supports", lambda *_: False)
    return request.param


def run_forward(**changes: Any) -> Any:
    inputs = {"params": PARAMS, "input_ids": BATCH.input_ids, "config": CONFIG} | changes
    return forward(inputs.pop("params"), inputs.pop("input_ids"), inputs.pop("config"), **inputs)


def step(batch: Batch = BATCH, hyper: HyperParams = HyperParams(), **how: Any) -> Any:  # noqa: B008
    return hyper_step(init_state(CONFIG, seeded(0)), batch, hyper, CONFIG, **how)


def with_value(t: Tensor, value: int) -> Tensor:
    changed = t.clone()
    changed.view(-1)[3] = value
    return changed


def with_mask(value: int) -> Batch:
    return BATCH._replace(attention_mask=with_value(BATCH.attention_mask, value))


def counterfactual(batch: Batch, **how: Any) -> Tensor:
    return counterfactual_losses(PARAMS, batch, CONFIG, torch.zeros(2, 2, 1, dtype=torch.int64), **how)


CHOICES = torch.full((2, 10), -1)
TEACHER = torch.zeros(2, 5, 13)
TAUGHT = HyperParams(distill_alpha=0.5)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a token of the vocabulary's size": (
        lambda: run_forward(input_ids=with_value(BATCH.input_ids, 13)), "input_ids: .*12, got 13",
    ),
    "a negative token": (lambda: run_forward(input_ids=with_value(BATCH.input_ids, -1)), "input_ids: .*got -1"),
    "no row": (lambda: run_forward(input_ids=BATCH.input_ids[:0]), "input_ids: expected at least one token"),
    "no token in a batch": (
        lambda: step(Batch(*(t[:, :0] for t in BATCH))), r"input_ids: expected at least one token, got shape \(2, 0\)",
    ),
    "tokens of int32": (lambda: run_forward(input_ids=BATCH.input_ids.int()), "input_ids: expected torch.int64"),
    "explore beyond the experts": (lambda: run_forward(explore=with_value(CHOICES, 4)), "explore: .*got 4"),
    "override beyond the experts": (
        lambda: run_forward(override=with_value(CHOICES, 10**7)), "override: .*got 10000000",
    ),
    "override below -1": (lambda: run_forward(override=with_value(CHOICES, -2)), "override: .*got -2"),
    "explore of another shape": (lambda: run_forward(explore=CHOICES[:, 1:]), "explore: expected shape"),
    "a hook point with fewer rows": (
        lambda: run_forward(apply_w2=lambda *args: apply_w2(*args)[:3]), "apply_w2: output: expected shape",
    ),
    "another hook point with fewer rows": (
        lambda: run_forward(apply_w13=lambda *args: tuple(t[:3] for t in apply_w13(*args))), "expected",
    ),
    "labels that are longer": (
        lambda: step(BATCH._replace(labels=torch.zeros(2, 6, dtype=torch.int64))), "labels: expected shape",
    ),
    "labels that are transposed": (lambda: step(BATCH._replace(labels=BATCH.labels.T)), "labels: expected shape"),
    "a label of the vocabulary's size": (
        lambda: step(BATCH._replace(labels=with_value(BATCH.labels, 13))), "labels: .*got 13",
    ),
    "a negative label": (
        lambda: step(BATCH._replace(labels=with_value(BATCH.labels, -1))), "labels: .* or -100, got -1",
    ),
    "labels of int32": (lambda: step(BATCH._replace(labels=BATCH.labels.int())), "labels: expected torch.int64"),
    "a label of cross_entropy": (lambda: cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3])), "labels: .*got 3"),
    "a negative rate": (lambda: step(hyper=HyperParams(lr=-1)), "hyper.lr: expected 0 or more, got -1"),
    "a coefficient with an axis and no vmap": (
        lambda: step(hyper=HyperParams(balance_weight=torch.zeros(3))),
        r"hyper.balance_weight: expected a number or a 0-d tensor, got shape \(3,\); map runs with vmap",
    ),
    "a coefficient with an axis of one": (
        lambda: step(hyper=HyperParams(lr=torch.zeros(1))), r"hyper.lr: expected a number or a 0-d tensor, got",
    ),
    "a negative number in the mask": (lambda: run_forward(attention_mask=with_mask(-1)[2]), "attention_mask: .*got -1"),
    "a negative number in a step's mask": (lambda: step(with_mask(-7)), "attention_mask: expected 0 or more, got -7"),
    "a mask of int32": (
        lambda: step(BATCH._replace(attention_mask=BATCH.attention_mask.int())),
        "attention_mask: expected torch.int64 or torch.bool, 0 on padding, got torch.int32",
    ),
    "a teacher of one token": (
        lambda: step(hyper=TAUGHT, teacher_logits=TEACHER[:, :1]),
        r"teacher_logits: expected shape \(2, 5, 13\), got \(2, 1, 13\)",
    ),
    "a teacher of another vocabulary": (
        lambda: step(hyper=TAUGHT, teacher_logits=TEACHER[..., :1]), "teacher_logits: expected shape",
    ),
    "a teacher with an axis more": (
        lambda: step(hyper=TAUGHT, teacher_logits=TEACHER[None]), "teacher_logits: expected shape",
    ),
    "no teacher": (lambda: step(hyper=TAUGHT), "teacher_logits: expected some with hyper.distill_alpha of 0.5, got no"),
    "a negative label of the oracle": (
        lambda: counterfactual(BATCH._replace(labels=with_value(BATCH.labels, -1))), "labels: .*got -1",
    ),
    "labels of int32 of the oracle": (
        lambda: counterfactual(BATCH._replace(labels=BATCH.labels.int())), "labels: expected torch.int64",
    ),
    "a budget of the oracle": (
        lambda: counterfactual(BATCH, surprise_budget=5.0), r"surprise_budget: expected a number in \(0, 1\], got 5.0",
    ),
    "offsets behind the rows": (
        lambda: run_forward(apply_w2=lambda i, h, w, rows: apply_w2(i, h, w, rows._replace(offsets=rows.offsets + 9))),
        "grouped_matmul: expected offsets that ascend from 0 to 20 at most",
    ),
    "offsets that descend": (
        lambda: run_forward(
            apply_w2=lambda at, h, w, rows: apply_w2(at, h, w, rows._replace(offsets=rows.offsets.flip(0)))
        ),
        "grouped_matmul: expected offsets that ascend from 0 to 20 at most",
    ),
    "fewer rows than the offsets": (
        lambda: run_forward(apply_w2=lambda at, h, w, rows: apply_w2(at, h[:9], w, rows)),
        "grouped_matmul: expected offsets that ascend from 0 to 9 at most",
    ),
    "a prompt of int32": (
        lambda: generate(PARAMS, BATCH.input_ids.int(), CONFIG, seeded(0), max_new_tokens=1),
        "prompt: expected torch.int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_in_a_line(name: str, way: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, IndexError), match=message):
        call()


OTHERS = {
    "vocabulary": dict(vocab_size=14), "layers": dict(num_hidden_layers=1), "more layers": dict(num_hidden_layers=3),
    "experts": dict(num_experts=3), "width": dict(hidden_size=4), "inner": dict(moe_intermediate_size=3),
    "heads": dict(num_attention_heads=4), "groups": dict(num_key_value_heads=2),
    "head": dict(tie_word_embeddings=False),
}  # fmt: skip
WAYS_IN: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda params, config: forward(params, BATCH.input_ids, config),
    "hyper_step": lambda params, config: hyper_step(
        init_state(CONFIG, seeded(0))._replace(params=params), BATCH, HyperParams(), config
    ),
    "per_token_surprise": lambda params, config: per_token_surprise(params, BATCH, config, HyperParams()),
    "generate": lambda params, config: generate(params, BATCH.input_ids, config, seeded(0), max_new_tokens=1),
    "start_decoding": lambda params, config: start_decoding(params, config, 2, 5),
    "counterfactual_losses": lambda params, config: counterfactual_losses(
        params, BATCH, config, torch.zeros(config.num_hidden_layers, 2, 1, dtype=torch.int64)
    ),
    "mapped forward": lambda params, config: vmap(lambda own: forward(own, BATCH.input_ids, config)[0])(
        stack([params])
    ),
    "a gradient": lambda params, config: grad(lambda own: forward(own, BATCH.input_ids, config)[0].sum())(params),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("entrance", WAYS_IN)
def test_parameters_of_another_configuration_are_refused_by_the_name_of_a_leaf(entrance: str, other: str) -> None:
    config = tiny_config(num_experts_per_tok=2, **OTHERS[other])
    with pytest.raises(ValueError, match=r"^params\.[a-z0-9_.]+: expected (shape \(|no such leaf).*, got "):
        WAYS_IN[entrance](PARAMS, config)


@pytest.mark.parametrize("entrance", WAYS_IN)
def test_parameters_of_the_configuration_are_taken(entrance: str) -> None:
    """The negative twin."""
    WAYS_IN[entrance](PARAMS, CONFIG)


def test_an_unknown_and_a_missing_leaf_are_named() -> None:
    more, fewer = tree_map(torch.clone, PARAMS), tree_map(torch.clone, PARAMS)
    more["layers"]["moe"]["w4"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"params.layers.moe.w4: expected no such leaf, got \(3,\)"):
        run_forward(params=more)
    del fewer["layers"]["moe"]["w2"]
    with pytest.raises(ValueError, match=r"params.layers.moe.w2: expected shape \(2, 4, 6, 8\), got no such leaf"):
        run_forward(params=fewer)


def test_a_hook_point_that_knows_where_the_other_experts_are_may_have_a_shard_of_them() -> None:
    sharded = tree_map(torch.clone, PARAMS)
    for name in ("w1", "w3", "w2"):
        sharded["layers"]["moe"][name] = sharded["layers"]["moe"][name][:, :2]
    of_all = PARAMS["layers"]["moe"]

    def gate_and_up(layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        return apply_w13(layer, x, of_all["w1"][layer], of_all["w3"][layer], rows)

    def down(layer: int, hidden: Tensor, w2: Tensor, rows: Any) -> Tensor:
        return apply_w2(layer, hidden, of_all["w2"][layer], rows)

    assert_same_bits(run_forward(params=sharded, apply_w13=gate_and_up, apply_w2=down)[0], run_forward()[0])
    with pytest.raises(ValueError, match=r"params.layers.moe.w1: expected shape \(2, 4, 8, 6\), got \(2, 2, 8, 6\)"):
        run_forward(params=sharded)


def test_a_mask_of_bool_is_the_mask_of_its_numbers(way: str) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    numbers, bools = (step(BATCH._replace(attention_mask=kind)) for kind in (mask, mask.bool()))
    assert_same_bits(bools, numbers)


def test_a_mapped_coefficient_has_no_axis() -> None:
    """The negative twin: the axis of a vmap is none of the coefficient's."""
    rates, state = torch.tensor([0.1, 0.2]), init_state(CONFIG, seeded(0))
    by_run = vmap(lambda lr: hyper_step(state, BATCH, HyperParams(lr=lr), CONFIG)[1].lr)(rates)
    assert by_run.tolist() == pytest.approx([0.1, 0.2])


BANANAS = "ValueError: kind: expected one of w2, unweighted, experts, input, benefit, oracle, got 'bananas'"
ONE_AXIS = "ValueError: input_ids: expected (batch, seq) and axes of runs in front, got (5,)"
MASK = "ValueError: attention_mask: expected shape (2, 5), got (2, 4)"
ADDED = "ValueError: attention_mask: expected torch.int64 or torch.bool, 0 on padding, got torch.float32"
SURFACE = "ValueError: per_token_surprise: expected (layers, tokens, experts) of floating point numbers, got "
ONE_PROMPT = "ValueError: prompt: expected (batch, tokens), got shape (5,)"
BOOLS = "ValueError: teacher_logits: expected floating point numbers, got torch.bool"
WINDOW = "ValueError: context_length: expected a whole number of 1 or more, got 2.5"
GENERATE = "tiny_onn_func.generate(state.params, {}, config, seeded(0), max_new_tokens=1{})"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("training.hyper_step(state, batch, hyper, config, kind='bananas')", BANANAS),
        ("training.per_token_surprise(state.params, batch, config, hyper, kind='bananas')", BANANAS),
        ("training.SurpriseHookManager(torch.full((2, 10, 4), torch.inf), kind='bananas')", BANANAS),
        ("tiny_onn_func.forward(state.params, batch.input_ids[0], config)", ONE_AXIS),
        ("training.hyper_step(state, batch._replace(attention_mask=torch.ones(2, 4)), hyper, config)", MASK),
        ("tiny_onn_func.forward(state.params, batch.input_ids, config, attention_mask=torch.zeros(2, 5))", ADDED),
        ("training.hyper_step(state, batch._replace(attention_mask=torch.zeros(2, 5)), hyper, config)", ADDED),
        ("training.hyper_step(state, batch, hyper, config, teacher_logits=torch.ones(2, 5, 13).bool())", BOOLS),
        (
            "training.SurpriseHookManager(torch.zeros(2, 10, 4, dtype=torch.int64))",
            SURFACE + "(2, 10, 4) of torch.int64",
        ),
        ("training.SurpriseHookManager(torch.zeros(10, 4))", SURFACE + "(10, 4) of torch.float32"),
        (GENERATE.format("batch.input_ids[0]", ""), ONE_PROMPT),
        (GENERATE.format("batch.input_ids", ", context_length=2.5"), WINDOW),
    ],
)
def test_what_a_type_checker_would_refuse_is_refused_without_one(call: str, message: str) -> None:
    """In a process of its own, as users run it."""
    program = (
        "import tiny_onn_func, torch, training; from tests.helpers import TINY as config, seeded, tiny_batch\n"
        "state, batch, hyper = training.init_state(config, seeded(0)), tiny_batch(), training.HyperParams()\n" + call
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stderr.strip().splitlines()[-1] == message


def test_a_step_in_inference_mode_is_refused_in_a_line() -> None:
    state = init_state(CONFIG, seeded(0))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode: expected a step outside of it"):
        hyper_step(state, BATCH, HyperParams(), CONFIG)


def test_mapped_tokens_out_of_range_do_not_read_another_run(way: str) -> None:
    ids = torch.stack([BATCH.input_ids, with_value(BATCH.input_ids, 13 + 5)])
    with pytest.raises(IndexError, match="input_ids: expected 0 to 12, got 18"):
        vmap(lambda params, ids: forward(params, ids, CONFIG)[0])(stack([PARAMS, PARAMS]), ids)


SURFACES = {
    "tokens": (2, 3, 4), "more tokens": (2, 20, 4), "experts": (2, 10, 2), "layers": (1, 10, 4), "runs": (3, 2, 10, 4),
}  # fmt: skip


@pytest.mark.parametrize("shape", SURFACES.values(), ids=SURFACES)
def test_a_surprise_matrix_of_other_sizes_is_refused(shape: tuple[int, ...], way: str) -> None:
    hooks = SurpriseHookManager(torch.full(shape, torch.inf))
    params = tree_map(lambda leaf: leaf.clone().requires_grad_(), PARAMS)
    with pytest.raises(ValueError, match=r"per_token_surprise: expected \(.*layers > \d, .*tokens, 4 experts\), got"):
        forward(params, BATCH.input_ids, CONFIG, apply_w2=hooks.apply_w2)[0].sum().backward()


def test_one_manager_over_two_forward_passes_is_refused_until_its_hooks_are_removed() -> None:
    hooks = SurpriseHookManager(torch.full((2, 10, 4), torch.inf))
    params = tree_map(lambda leaf: leaf.clone().requires_grad_(), PARAMS)
    forward(params, BATCH.input_ids, CONFIG, apply_w2=hooks.apply_w2)
    with pytest.raises(ValueError, match="expected one forward pass, got layer 0 again"):
        forward(params, BATCH.input_ids, CONFIG, apply_w2=hooks.apply_w2)
    hooks.remove_hooks()
    forward(params, BATCH.input_ids, CONFIG, apply_w2=hooks.apply_w2)[0].sum().backward()
    assert hooks.per_token_surprise.isfinite().sum() == 2 * 10 * 2


def test_a_hash_does_not_depend_on_the_width_of_the_ids() -> None:
    ids = torch.arange(50)
    assert_same_bits(hash_logits(ids.int(), 1, 8), hash_logits(ids, 1, 8))


# One rule, whoever computes it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["w2", "unweighted", "experts", "input", "benefit"])
def test_documents_without_a_target_have_no_surprise_and_do_not_teach(kind: str, way: str) -> None:
    config = tiny_config()
    batch = tiny_batch(config, 2, 12)
    mask = torch.tensor([[1] * 4 + [2] * 4 + [3] * 4] * 2)
    batch = Batch(batch.input_ids, torch.where(mask == 3, batch.labels, -100), mask)
    hyper, state = HyperParams(pi_alpha=1.0), init_state(config, seeded(0))
    surprise = per_token_surprise(state.params, batch, config, hyper, kind=kind)
    assert surprise.view(2, 2, 12, 4)[:, :, :8].abs().max() == 0
    assert float(hyper_step(state, batch, hyper, config, kind=kind)[1].tie_rate) == pytest.approx(2 / 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("routing", ["router", "token", "thresholds"])
def test_a_broken_router_shows_in_the_loss_and_in_the_counts(
    bad: float, dtype: torch.dtype | None, routing: str, way: str
) -> None:
    config = tiny_config(routing=routing)
    state = init_state(config, seeded(0))
    state.params["layers"]["moe"]["router"][0, 0, 0] = bad
    metrics = hyper_step(state, BATCH, HyperParams(), config, compute_dtype=dtype)[1]
    assert metrics.main_loss.isnan()
    assert metrics.nonfinite_surprise > 0


@pytest.mark.parametrize("shares", [None, torch.full((1, 1, 2), 0.5)])
def test_a_logit_of_infinity_has_no_loss_and_padding_has_no_gradient(shares: Tensor | None, way: str) -> None:
    no, real = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    targets, load = Targets(torch.zeros(1, 1, dtype=torch.int64), no, None, shares), torch.full((1, 2), 0.5)
    for logit in (torch.inf, torch.nan):
        logits = torch.tensor([[[logit, 0.0]]])
        assert router_loss(logits, targets, load, real, HyperParams()).z.isnan()
        padding = logits.clone().requires_grad_()
        loss = router_loss(padding, targets, load, ~real, HyperParams(balance_weight=1.0, z_weight=1.0))
        assert not torch.autograd.grad(loss.total, padding)[0].any()


def test_a_batch_of_padding_does_not_move_a_broken_router(way: str) -> None:
    state = init_state(CONFIG, seeded(0))
    state.params["layers"]["moe"]["router"][0, 0, 0] = torch.nan
    nothing = Batch(BATCH.input_ids, torch.full_like(BATCH.labels, -100), torch.zeros_like(BATCH.attention_mask))
    new, metrics = hyper_step(state, nothing, HyperParams(), CONFIG)
    assert float(metrics.router_grad_norm) == 0
    assert int(new.params["layers"]["moe"]["router"].isnan().sum()) == 1


def test_rows_of_one_token_do_not_move_what_scores_are_made_of(way: str) -> None:
    """Their softmax is over one key; a rounding would be divided by itself in AdamW."""
    state, alone = init_state(CONFIG, seeded(0)), Batch(*(t.reshape(-1, 1) for t in BATCH))
    documents = BATCH._replace(attention_mask=torch.arange(1, 6).expand(2, 5).contiguous())
    for batch in (alone, documents):
        moved = hyper_step(state, batch, HyperParams(weight_decay=0.0), CONFIG)[0].params["layers"]["self_attn"]
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            assert_same_bits(moved[name], state.params["layers"]["self_attn"][name], name)
        assert not torch.equal(moved["v_proj"], state.params["layers"]["self_attn"]["v_proj"])


@pytest.mark.parametrize("top_k", [2, -1])
@pytest.mark.parametrize("what", ["zeros", "tiny", "pairs", "surgery"])
def test_generation_chooses_the_experts_of_forward_on_ties(what: str, top_k: int, way: str) -> None:
    config = tiny_config(num_experts=8, num_experts_per_tok=top_k)
    params = init_params(config, seeded(0))
    router = params["layers"]["moe"]["router"]
    router *= {"zeros": 0.0, "tiny": 1e-9, "pairs": 30.0, "surgery": 1e-5}[what]
    if what == "pairs":
        router[:, :, 1::2] = router[:, :, 0::2]
    ids = BATCH.input_ids[:1]
    logits, trace = forward(params, ids, config, surprise_budget=0.3)
    out = decode(start_decoding(params, config, 1, 5, surprise_budget=0.3), ids, 0)
    for layer, routes in enumerate(out.routes):
        used = routes.active
        assert torch.equal(routes.expert_ids[used], trace.expert_ids[layer, :, : used.shape[1]][used])
    assert torch.allclose(out.logits[0], logits[0, -1], atol=1e-5)


def test_a_frozen_router_is_not_moved_by_regeneration() -> None:
    for hyper in (HyperParams(freeze_step=1), HyperParams(router_lr=0.0)):
        state = init_state(CONFIG, seeded(0))
        for number in range(6):
            before = state.params["layers"]["moe"]
            batch = tiny_batch(CONFIG, 2, 7, number)
            state, _ = hyper_step(state, batch, hyper._replace(regenerate_below=0.9, beta2=0.5), CONFIG)
            if number >= 1 or hyper.router_lr == 0:
                assert_same_bits(state.params["layers"]["moe"]["router"], before["router"])
        assert not torch.equal(state.params["layers"]["moe"]["w1"], before["w1"])


def test_a_router_that_learns_is_moved_by_regeneration() -> None:
    """The negative twin."""
    state = init_state(CONFIG, seeded(0))
    for number in range(6):
        state, _ = hyper_step(
            state,
            tiny_batch(CONFIG, 2, 7, number),
            HyperParams(router_lr=1e-9, regenerate_below=0.9, beta2=0.5),
            CONFIG,
        )
    moved = state.params["layers"]["moe"]["router"] - init_state(CONFIG, seeded(0)).params["layers"]["moe"]["router"]
    assert float(moved.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["lr", "surprise_weight", "router_coupling"])
def test_forward_mode_equals_reverse_mode_in_float32(name: str) -> None:
    state = init_state(CONFIG, seeded(0))._replace(params=spread_params(CONFIG, dtype=torch.float32))

    eps = 1e-3  # with 1e-8 the slope of AdamW's first step, g / |g|, is a difference of nearly equal numbers

    def later(number: Tensor) -> Tensor:
        first, _ = hyper_step(state, BATCH, HyperParams(**{name: number}, eps=eps), CONFIG)
        return hyper_step(first, BATCH, HyperParams(router_coupling=1.0, eps=eps), CONFIG)[1].main_loss

    at = torch.tensor(0.01)
    forwards, backwards = jvp(later, (at,), (torch.ones(()),))[1], grad(later)(at)
    assert float((forwards - backwards).abs()) <= 1e-4 * float(backwards.abs())


@pytest.mark.parametrize("name", Batch._fields)
def test_a_sparse_tensor_is_refused_by_its_name(name: str) -> None:
    sparse = BATCH._replace(**{name: getattr(BATCH, name).to_sparse()})
    with pytest.raises(ValueError, match=f"{name}: expected a dense tensor, got one of layout torch.sparse_coo"):
        hyper_step(init_state(CONFIG, seeded(0)), sparse, HyperParams(), CONFIG)
