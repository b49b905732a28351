"""Call the public API and every kernel with what nobody should give: `python -m tests.tiny_onn_func.kernels.hostile`.

A Python exception is an answer. What the kernels must not do is seen by those who watch the memory
(test_sanitizers.py).
"""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import batches, configs, seeded, shape_router
from tests.tiny_onn_func.kernels.calls import Sizes, calls
from tiny_onn_func import forward, generate, init_params
from tiny_onn_func.kernels import build
from training import HyperParams, hyper_step, init_state, per_token_surprise

AWKWARD = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -0.0, 1e20]
FAR = [-1, -100, -101, -(2**63), 2**63 - 1, 2**31, 2**32, 10**9, 7]
EXAMPLES = {"kernels": 300, "model": 50}


def cut(t: Tensor, place: int) -> Tensor:
    return t.narrow(place % t.ndim, 0, t.shape[place % t.ndim] // 2) if t.ndim else t


def awkward(t: Tensor, place: int) -> Tensor:
    """With one number that is out of range, or no number."""
    values = AWKWARD if t.is_floating_point() else FAR
    copy, value = t.clone(memory_format=torch.contiguous_format), values[place % len(values)]
    if t.numel() and t.dtype != torch.bool:
        largest = torch.iinfo(t.dtype).max if not t.is_floating_point() else math.inf
        copy.view(-1)[place % t.numel()] = min(value, largest) if value == value else value
    return copy


SPOILS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "nothing": lambda t, _: t,
    "awkward": awkward,
    "all the same": lambda t, place: torch.full_like(t, (AWKWARD if t.is_floating_point() else [0, -1, 99])[place % 3]),
    "strided": lambda t, _: torch.stack((t, t), dim=-1)[..., 0],
    "turned": lambda t, _: t.mT.contiguous().mT if t.ndim > 1 else t.flip(0),
    "repeated": lambda t, _: t[:1].expand_as(t) if t.ndim and t.shape[0] else t,
    "misplaced": lambda t, place: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "cut": cut,
    "longer": lambda t, place: torch.cat((t, t), dim=place % t.ndim) if t.ndim else t,
    "empty": lambda t, _: t[:0] if t.ndim else t,
    "flat": lambda t, _: t.flatten(),
    "float64": lambda t, _: t.double(),
    "int32": lambda t, _: t.nan_to_num().int() if t.is_floating_point() else t.int(),
    "uint8": lambda t, _: (t != 0).to(torch.uint8),
    "needs a gradient": lambda t, _: t.clone().requires_grad_() if t.is_floating_point() else t,
}  # fmt: skip
SPOILED = st.tuples(st.sampled_from(list(SPOILS)), st.integers(0, 1000))


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    experts = draw(st.sampled_from([1, 2, 3, 8, 17, 33]))
    return Sizes(
        runs=draw(st.integers(0, 2)), tokens=draw(st.sampled_from([0, 1, 2, 5, 7, 17, 33])),
        dim=draw(st.sampled_from([1, 2, 7, 8, 16, 33])), inner=draw(st.sampled_from([1, 3, 8, 16, 31, 40])),
        experts=experts, slots=draw(st.sampled_from([1, experts]) | st.integers(1, experts)),
        batch=draw(st.integers(0, 2)), groups=draw(st.integers(1, 2)), share=draw(st.integers(1, 3)),
    )  # fmt: skip


def tried(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Whatever Python says of it."""
    with suppress(Exception):
        function(*args, **kwargs)


@settings(max_examples=EXAMPLES["kernels"], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sizes=sizes(), seed=st.integers(0, 99), threads=st.integers(1, 2), data=st.data())
def kernels(sizes: Sizes, seed: int, threads: int, data: st.DataObject) -> None:
    torch.set_num_threads(threads)
    for call in calls(sizes, seed).values():
        call.function(**call.tensors)  # what agrees is no error
        spoiled = data.draw(st.lists(st.sampled_from(list(call.tensors)), min_size=1, max_size=2))
        tensors = dict(call.tensors)
        for name in spoiled:
            kind, place = data.draw(SPOILED)
            with suppress(Exception):  # what cannot be spoiled that way
                tensors[name] = SPOILS[kind](tensors[name], place)
        tried(call.function, **tensors)


@settings(max_examples=EXAMPLES["model"], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def model(data: st.DataObject) -> None:
    config = data.draw(configs())
    batch, seed = data.draw(batches(config)), data.draw(st.integers(0, 99))
    routers = st.sampled_from(["spread", "even", "tied", "one takes all", "huge", "tiny"])
    params = shape_router(init_params(config, seeded(seed), torch.float32), data.draw(routers))
    hyper = HyperParams(pi_alpha=data.draw(st.sampled_from([0.01, 0.5, 1.0])))
    state = init_state(config, seeded(seed))._replace(params=params)
    tried(hyper_step, state, batch, hyper, config)
    fields = list(batch._fields[:3])
    for name in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
        kind, place = data.draw(SPOILED)
        with suppress(Exception):
            batch = batch._replace(**{name: SPOILS[kind](getattr(batch, name), place)})
    if data.draw(st.booleans()):
        kind, place = data.draw(SPOILED)
        with suppress(Exception):
            router = SPOILS[kind](params["layers"]["moe"]["router"], place)
            params = params | {"layers": params["layers"] | {"moe": params["layers"]["moe"] | {"router": router}}}
    tried(hyper_step, state._replace(params=params), batch, hyper, config)
    tried(per_token_surprise, params, batch, config, hyper)
    tried(forward, params, batch.input_ids, config, attention_mask=batch.attention_mask)
    tried(generate, params, batch.input_ids, config, max_new_tokens=2)


def main() -> None:
    build.TOO_LONG = 1200  # with the sanitizers, beside other work
    if build.library() is None:
        sys.exit("the kernels could not be made or loaded")
    kernels()
    model()
    print("nothing was reported")


if __name__ == "__main__":
    main()
