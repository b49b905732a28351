"""The hook manager: looks at every application of an expert's matrices and records each routed row's surprise."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tiny_onn_func.experts import ApplyW2, ApplyW13, Rows, input_of, spread
from tiny_onn_func.experts import apply_w2 as plain_apply_w2
from tiny_onn_func.experts import apply_w13 as plain_apply_w13
from tiny_onn_func.primitives.vmap import rewrap, unwrap
from training.step.surprise import SurpriseKind, outer_norm, row_norm, scatter_rows, scatter_surprise


class SurpriseHookManager:
    """Wraps the seams of the experts; fills `per_token_surprise` while gradients flow back.

    surprise[l, t, e] = ||h_te|| * ||dLoss / dy_te||, the Frobenius norm of the gradient that token t alone puts on
    w2_e: that gradient is the outer product of h_te and dLoss / dy_te (Goodfellow 2015, arXiv 1510.01799). Other kinds
    stand in `training.step.surprise`; `experts` and `input` want `apply_w13` passed on, too.

    Under a torch.func transform make `per_token_surprise` inside the transformed function, from a value that the
    transform has wrapped (`leaf.new_full(...)`), and return it through `has_aux`; a tensor from outside is refused.

    Args:
        per_token_surprise: (..., L, T, E), +inf everywhere; entries of routed rows become finite, sparse fill.
        apply_w2: the application to wrap.
        kind: what is recorded; those of `PER_WEIGHT` are to be divided by the routing weight afterwards.
        apply_w13: the application of gate and up to wrap.
    """

    def __init__(
        self,
        per_token_surprise: Float[Tensor, "*runs layers tokens experts"],
        apply_w2: ApplyW2 = plain_apply_w2,
        kind: SurpriseKind = "w2",
        apply_w13: ApplyW13 = plain_apply_w13,
    ) -> None:
        self.per_token_surprise = per_token_surprise
        self._apply_w2, self._apply_w13, self._kind = apply_w2, apply_w13, kind
        self._handles: list[RemovableHandle] = []
        self._saved: dict[int, tuple[Tensor, Rows]] = {}  # by layer: what w2's gradient is measured with
        self._inputs: dict[int, tuple[Tensor, Rows]] = {}  # by layer: what comes into w1 and w3
        self._so_far: dict[int, list[Tensor]] = {}  # by layer: the parts of the three matrices, until all are known

    def apply_w2(self, layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        """The wrapped application; saves w2's inputs and the rows' indices and hooks its output."""
        y = self._apply_w2(layer, hidden, w2, rows)
        if self._kind != "input" and self._hook(y, lambda grad: self._record_w2(layer, grad)):
            self._saved[layer] = ((y if self._kind == "benefit" else hidden).detach(), rows)
        return y

    def apply_w13(self, layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The wrapped application of gate and up."""
        if self._kind == "input":  # the gradient of a row's input wants a tensor with rows
            x, rows = spread(x, rows)
        out = self._apply_w13(layer, x, w1, w3, rows)
        for hooked in {"experts": out, "input": (x,)}.get(self._kind, ()):
            if self._hook(hooked, lambda grad: self._record_w13(layer, grad)):
                self._inputs[layer] = (x.detach(), rows)
        return out

    def remove_hooks(self) -> None:
        """Take the hooks off and drop the saved rows, for callers who keep the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for saved in (self._saved, self._inputs, self._so_far):
            saved.clear()

    def _hook(self, seen: Tensor, record: Callable[[Tensor], None]) -> bool:
        inside, axes = unwrap(seen)  # a mapped tensor has no graph of its own
        if inside.requires_grad:
            # Detached: torch.func.grad differentiates with create_graph; an attached norm would tie the graph into a
            # cycle.
            self._handles.append(inside.register_hook(lambda grad: record(rewrap(grad.detach(), axes))))
        return inside.requires_grad

    def _record_w2(self, layer: int, grad: Tensor) -> None:
        saved, rows = self._saved[layer]
        if self._kind == "experts":
            self._so_far[layer] = [outer_norm(saved, grad)]
        else:
            self._write(layer, saved, grad, rows)

    def _record_w13(self, layer: int, grad: Tensor) -> None:
        x, rows = self._inputs[layer]
        if self._kind == "input":
            self._fill(layer, row_norm(grad), rows)
            return
        parts = self._so_far[layer]
        parts.append(row_norm(x).gather(-1, input_of(x, rows)) * row_norm(grad))
        if len(parts) == 3:  # the squares of all three matrices add up
            del self._so_far[layer]
            self._fill(layer, parts[0].hypot(parts[1]).hypot(parts[2]), rows)

    def _write(self, layer: int, left: Tensor, grad: Tensor, rows: Rows) -> None:
        surprise_matrix = self.per_token_surprise.select(-3, layer)
        surprise_matrix.copy_(
            scatter_surprise(left, grad, rows, *surprise_matrix.shape[-2:], is_signed=self._kind == "benefit")
        )

    def _fill(self, layer: int, values: Tensor, rows: Rows) -> None:
        surprise_matrix = self.per_token_surprise.select(-3, layer)
        surprise_matrix.copy_(
            scatter_rows(values.to(surprise_matrix.dtype), rows.token, rows.expert, *surprise_matrix.shape[-2:])
        )
