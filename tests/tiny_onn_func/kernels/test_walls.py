"""The last wall: what C would read beyond memory, or as something else, is refused by the wrapper or by the kernel."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.tiny_onn_func.kernels.calls import calls
from tiny_onn_func.kernels import build, forward, step
from training.step.batch import IGNORE_INDEX

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
CALLS = calls() if build.library() else {}
ARGUMENTS = [(kernel, name) for kernel, call in CALLS.items() for name in call.tensors]
INDICES = [(kernel, name) for kernel, call in CALLS.items() for name in call.indices]
WHERE = {"target": "informative", "expert_ids": "active"}  # what says which of the indices are used


@pytest.fixture(autouse=True)
def as_it_runs() -> Iterator[None]:
    """Without the checks of the annotations, which only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("kernel", CALLS)
def test_what_agrees_is_taken(kernel: str) -> None:
    CALLS[kernel].function(**CALLS[kernel].tensors)


@pytest.mark.parametrize(("kernel", "name"), ARGUMENTS)
def test_another_dtype_is_refused_with_both_dtypes_told(kernel: str, name: str) -> None:
    function, tensors, _ = CALLS[kernel]
    dtype = torch.float16 if tensors[name].is_floating_point() else torch.int16
    message = f"{in_c(kernel)}: expected .*{tensors[name].dtype}.*{dtype}"
    with pytest.raises(ValueError, match=message):
        function(**tensors | {name: tensors[name].to(dtype)})


@pytest.mark.parametrize(("kernel", "name"), ARGUMENTS)
def test_another_size_along_any_axis_is_refused(kernel: str, name: str) -> None:
    function, tensors, _ = CALLS[kernel]
    for axis in range(tensors[name].ndim):
        if (kernel, name, axis) in FREE:
            continue
        longer = torch.cat((tensors[name], tensors[name].narrow(axis, 0, 1)), dim=axis)
        for other in (longer, tensors[name].narrow(axis, 0, 0)):
            with pytest.raises(ValueError, match="expected"):
                function(**tensors | {name: other})


FREE = {  # sizes that no other tensor shares, or that say how many results there are
    ("grouped_matmul", "weights", 3), ("grouped_matmul, transposed", "weights", 3), ("grouped_outer", "rows", 2),
    ("grouped_outer", "grads", 2), ("grouped_outer", "offsets", 1), ("grouped_matmul of tokens", "x", 1),
    ("grouped_matmul of tokens", "weights", 3), ("grouped_matmul of tokens", "token", 1),
    ("grouped_outer of tokens", "x", 1), ("grouped_outer of tokens", "x", 2), ("grouped_outer of tokens", "grads", 2),
    ("grouped_outer of tokens", "offsets", 1), ("scaled_rows", "x", 1), ("scaled_rows", "weights", 1),
    ("scaled_rows", "order", 0), ("combined_rows", "y", 0), ("combined_rows", "y", 1), ("attention", "bias", 0),
    ("attention_grad", "bias", 0), ("grouped_matmul", "rows", 1), ("grouped_matmul, transposed", "rows", 1),
    ("rms_norm", "x", 1), ("split_heads", "qkv", 1), ("split_heads", "qkv", 3), ("split_heads", "norms", 1),
    ("attention", "q", 2), ("cross_entropy", "logits", 1), ("cross_entropy_grad", "logits", 1),
    ("least_surprised", "surprise", 1), ("least_surprised", "surprise", 3), ("router_sums", "logits", 3),
    ("spread_surprise", "left", 2), ("spread_surprise", "right", 2), ("finish_step", "params", 1),
}  # fmt: skip


def in_c(kernel: str) -> str:
    return kernel.split(",")[0].split(" ")[0]


def used_everywhere(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {name: torch.ones_like(tensors[name]) for name in WHERE.values() if name in tensors}


@pytest.mark.parametrize("value", ["bound", "far", -1, -(2**31)])
@pytest.mark.parametrize(("kernel", "name"), INDICES)
def test_an_index_outside_is_refused_wherever_it_stands(kernel: str, name: str, value: str | int) -> None:
    function, tensors, bounds = CALLS[kernel]
    number = {"bound": bounds[name], "far": 2**30}.get(value, value) if isinstance(value, str) else value
    tensors = used_everywhere(tensors)
    behind = name in ("token", "expert")  # the last rows are nobody's
    for place in (0, 1 if behind else tensors[name].numel() - 1):
        spoiled = tensors[name].clone()
        spoiled.view(-1)[place] = number
        with pytest.raises(IndexError, match=f"{in_c(kernel)}: expected .*{name}.*, got some outside"):
            function(**tensors | {name: spoiled})


@pytest.mark.parametrize(("kernel", "name"), [pair for pair in INDICES if pair[1] in WHERE])
def test_an_index_that_is_not_used_may_be_any_number(kernel: str, name: str) -> None:
    function, tensors, _ = CALLS[kernel]
    for number in (10**9, -1):
        spoiled = {name: torch.full_like(tensors[name], number), WHERE[name]: torch.zeros_like(tensors[WHERE[name]])}
        function(**tensors | spoiled)


def test_offsets_that_descend_are_refused() -> None:
    for kernel in ("grouped_matmul", "grouped_outer"):
        function, tensors, _ = CALLS[kernel]
        with pytest.raises(IndexError, match="offsets that ascend from 0 to 10 at most, got some outside"):
            function(**tensors | {"offsets": torch.tensor([[5, 4, 6]], dtype=torch.int32)})


def test_only_the_label_of_no_target_costs_nothing() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX
    logits, labels = torch.randn(3, 4), torch.tensor([1, IGNORE_INDEX, 3])
    losses, entropies, *known = step.cross_entropy(logits, labels)
    assert (losses > 0).tolist() == (entropies > 0).tolist() == [True, False, True]
    grads = step.cross_entropy_grad(torch.ones(3), logits, labels, *known)
    assert not grads[1].any()
    torch.testing.assert_close(grads.sum(dim=-1), torch.zeros(3), atol=1e-6, rtol=0)
    for label in (-1, -99, -101, 4):
        labels[1] = label
        message = r"expected labels in \[0, 4\) or -100.*, got some outside"
        with pytest.raises(IndexError, match="cross_entropy: " + message):
            step.cross_entropy(logits, labels)
        with pytest.raises(IndexError, match="cross_entropy_grad: " + message):
            step.cross_entropy_grad(torch.ones(3), logits, labels, *known)


def test_more_slots_than_experts_and_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"choose: expected slots in \[0, 3\], got 4"):
        forward.choose(**CALLS["choose"].tensors, slots=4, least=1, dynamic=True)
    tensors = {name: t[..., :5] for name, t in CALLS["split_heads"].tensors.items()}
    with pytest.raises(ValueError, match="split_heads: expected 2 to 4 norms and an even dim, got 3 and 5"):
        forward.split_heads(**tensors, eps=1e-6)


@pytest.mark.parametrize("count", [0, 3])
def test_a_sum_of_other_than_one_or_two_products_is_refused(count: int) -> None:
    rows, weights = torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"one or two pairs of rows and weights, got {count}"):
        forward.matmul([(rows, weights)] * count, torch.full((1, 1), 2, dtype=torch.int32))
