"""The hook manager: looks at every application of w2 and records each routed row's surprise in the backward pass."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tiny_onn_func.experts import ApplyW2, Rows
from tiny_onn_func.experts import apply_w2 as plain_apply_w2
from training.mapped import peel, wrap


class SurpriseHookManager:
    """Wraps the w2 seam; fills `per_token_surprise` while gradients flow back.

    surprise[l, t, e] = ||h_te|| * ||dLoss / dy_te||, the Frobenius norm of the gradient that token t alone puts on
    w2_e: that gradient is the outer product of h_te and dLoss / dy_te (Goodfellow 2015, arXiv 1510.01799).

    Under a torch.func transform make `per_token_surprise` inside the transformed function, from a value that the
    transform has wrapped (`leaf.new_full(...)`), and return it through `has_aux`; a tensor from outside is refused.

    Args:
        per_token_surprise: (L, T, E), +inf everywhere; entries of routed rows become finite, sparse fill.
        apply_w2: the application to wrap.
    """

    def __init__(
        self, per_token_surprise: Float[Tensor, "layers tokens experts"], apply_w2: ApplyW2 = plain_apply_w2
    ) -> None:
        self.per_token_surprise = per_token_surprise
        self._apply_w2 = apply_w2
        self._handles: list[RemovableHandle] = []
        self._saved: dict[int, tuple[Tensor, Rows]] = {}  # by layer

    def apply_w2(self, layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        """The wrapped application; saves w2's inputs and the rows' indices and hooks its output."""
        y = self._apply_w2(layer, hidden, w2, rows)
        inside, axes = peel(y)  # a mapped tensor has no graph of its own
        if inside.requires_grad:
            self._saved[layer] = (hidden.detach(), rows)
            self._handles.append(inside.register_hook(lambda grad: self._record(layer, wrap(grad, axes))))
        return y

    def _record(self, layer: int, grad: Tensor) -> None:
        # Detached: torch.func.grad differentiates with create_graph; an attached norm would tie the graph into a cycle.
        hidden, rows = self._saved[layer]
        surface = self.per_token_surprise[layer]
        surface.copy_(sparse_fill(row_surprise(hidden, grad.detach()).to(surface.dtype), rows, *surface.shape))

    def remove_hooks(self) -> None:
        """Take the hooks off and drop the saved rows, for callers who keep the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._saved.clear()


def row_surprise(hidden: Float[Tensor, "rows inner"], grad: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """||h|| * ||g|| of every row, float32 or wider: the outer product is never made."""
    return _row_norm(hidden) * _row_norm(grad)


def sparse_fill(
    surprise: Float[Tensor, " rows"], rows: Rows, tokens: int, experts: int
) -> Float[Tensor, "tokens experts"]:
    """Rows' values at [token, expert], +inf elsewhere; inactive rows (expert = `experts`) fall into a spare column."""
    spare = experts + 1
    flat = surprise.new_full((tokens * spare,), torch.inf).scatter(0, rows.token * spare + rows.expert, surprise)
    return rearrange(flat, "(tokens spare) -> tokens spare", spare=spare)[:, :experts]


def _row_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
