"""Expert parallelism: each row is sent to the rank that holds its expert, and its output is sent back.

    forward    rows' inputs to the owners -> w1, w3, w2 there -> outputs back
    backward   outputs' gradients to the owners -> ... -> inputs' gradients back, each with a number more: surprise

The owner has h and dLoss / dy of every row that came, so it measures surprise without any further message; what the
token's own router must know of it is a number, which rides on the gradient that goes back anyway.

Collectives run inside plain autograd's passes only: torch.func refuses these functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tiny_onn_func.experts import Rows, spread
from training.distributed.collectives import Group
from training.step.hooks import SurpriseHookManager
from training.step.surprise import SurpriseKind

ROWS, SURPRISE, SIZES = "rows of experts", "surprise of rows", "numbers of rows"  # purposes of messages


class DispatchPlan(NamedTuple):
    """Exchange of one layer's rows between the ranks."""

    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process
    order: Tensor  # received rows, sorted by expert
    inverse: Tensor
    rows: Rows  # the received ones; a row is its own token and input


class ExpertParallelHooks:
    """Hooks for experts spread over a group: move rows between ranks, around a SurpriseHookManager's hook points.

    Args:
        per_token_surprise, kind: as for `SurpriseHookManager`; the matrix is that of this process's tokens.
        group: the processes that hold the experts of a layer together, equally many each, in the order of ranks.
    """

    def __init__(self, per_token_surprise: Tensor, kind: SurpriseKind = "w2", *, group: Group) -> None:
        self._manager = SurpriseHookManager(per_token_surprise, kind=kind, on_rows=self._keep)
        self._group = group
        self._plans: dict[int, DispatchPlan] = {}
        self._measured: dict[int, Tensor] = {}  # by layer: surprise of the received rows

    @property
    def per_token_surprise(self) -> Tensor:
        """Surprise of this rank's tokens."""
        return self._manager.per_token_surprise

    def apply_w13(self, layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Gate and up of the received rows, which may be fewer or more than the sent ones."""
        plan = self._plans[layer] = plan_dispatch(rows, w1.shape[0], self._group)

        def came_back(surprise: Tensor) -> None:
            count = surprise.shape[0]
            sent = rows._replace(token=rows.token[:count], expert=rows.expert[:count])
            self._manager.write_rows(layer, surprise, sent)

        there = _ToOwners.apply(spread(x, rows)[0], plan, self._group, lambda: self._measured.pop(layer), came_back)
        return self._manager.apply_w13(layer, there, w1, w3, plan.rows)

    def apply_w2(self, layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        """Outputs of the sent rows, in the order in which they were sent."""
        plan = self._plans.pop(layer)
        y = self._manager.apply_w2(layer, hidden, w2, plan.rows)
        return _FromOwners.apply(y, plan, self._group, rows.token.shape[0])

    def _keep(self, layer: int, values: Tensor, rows: Rows) -> None:
        self._measured[layer] = values


def plan_dispatch(rows: Rows, own_experts: int, group: Group) -> DispatchPlan:
    """Exchange the number of rows of each expert, and plan the order of the received rows."""
    counts = torch.diff(rows.offsets.long(), prepend=rows.offsets.new_zeros(1, dtype=torch.int64))
    each = [own_experts] * group.size
    came = group.all_to_all(counts, each, each, SIZES).reshape(group.size, own_experts)
    sent = counts.reshape(group.size, own_experts).sum(dim=1).tolist()
    expert = torch.arange(own_experts, device=counts.device).repeat(group.size).repeat_interleave(came.flatten())
    expert, order = expert.sort(stable=True)
    number = torch.arange(order.shape[0], device=order.device)
    offsets = came.sum(dim=0).cumsum(dim=0).to(torch.int32)
    inverse = torch.empty_like(order).scatter(0, order, number)
    if not order.shape[0]:  # nothing came: an inactive row, as there is no computing with none
        number, expert = number.new_zeros(1), expert.new_full((1,), own_experts)
    return DispatchPlan(sent, came.sum(dim=1).tolist(), order, inverse, Rows(number, expert, offsets, number, number))


class _ToOwners(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: DispatchPlan,
        group: Group,
        measured: Callable[[], Tensor],
        came_back: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.about, ctx.rows = (plan, group, measured, came_back), x.shape[0]
        came = group.all_to_all(x[: sum(plan.sent)], plan.sent, plan.received, ROWS)[plan.order]
        return _behind(came, plan.rows.token.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, group, measured, came_back = ctx.about
        surprise = measured()
        # The bits of the number as columns: one of float32 or float64, two of bfloat16.
        cargo = torch.cat((grad, surprise.unsqueeze(1).view(grad.dtype)), dim=1)[plan.inverse]
        back = group.all_to_all(cargo, plan.received, plan.sent, ROWS)
        extra = surprise.element_size() * (sum(plan.received) - plan.received[group.rank])
        group.sent.update({ROWS: -extra, SURPRISE: extra})
        came_back(back[:, grad.shape[1] :].contiguous().view(surprise.dtype).squeeze(1))
        return _behind(back[:, : grad.shape[1]], ctx.rows), None, None, None, None


class _FromOwners(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: DispatchPlan, group: Group, rows: int) -> Tensor:
        ctx.about = plan, group
        return _behind(group.all_to_all(y[plan.inverse], plan.received, plan.sent, ROWS), rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, group = ctx.about
        there = group.all_to_all(grad[: sum(plan.sent)], plan.sent, plan.received, ROWS)
        return _behind(there[plan.order], plan.rows.token.shape[0]), None, None, None


def _behind(active: Tensor, rows: int) -> Tensor:
    """Append zeros for the inactive rows, which are never sent."""
    missing = rows - active.shape[0]
    return torch.cat((active, active.new_zeros(missing, active.shape[1]))) if missing else active.contiguous()
