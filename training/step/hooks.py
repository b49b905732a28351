"""SurpriseHookManager: tensor hooks on expert outputs that write each routed (layer, token, expert)'s surprise."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tiny_onn_func.experts import ApplyW2, ApplyW13, Rows, spread
from tiny_onn_func.experts import apply_w2 as plain_apply_w2
from tiny_onn_func.experts import apply_w13 as plain_apply_w13
from tiny_onn_func.kernels.runtime import is_traced
from tiny_onn_func.primitives.vmap import rewrap, unwrap, unwrap_all
from training.step.surprise import HookPoint, SurpriseKind, kind_of, scatter_rows

OnRows = Callable[[int, Tensor, Rows], None]  # (layer, surprise of each row, rows)
PARTS = {"output": 1, "gate_up": 2, "input": 1}  # tensors that are hooked at a place


class SurpriseHookManager:
    """Wrap the hook points of the experts; fill `per_token_surprise` while gradients flow back.

    surprise[l, t, e] = ||h_te|| * ||dLoss / dy_te||, the Frobenius norm of the gradient that token t alone puts on
    w2_e: that gradient is the outer product of h_te and dLoss / dy_te (Goodfellow 2015, arXiv 1510.01799). The other
    kinds stand in `training.step.surprise`; `experts` and `input` need `apply_w13` passed on, too.

    Under a torch.func transform make `per_token_surprise` inside the transformed function, from a value that the
    transform has wrapped (`leaf.new_full(...)`), and return it through `has_aux`; a tensor from outside is refused.

    A manager is for one forward and one backward pass; `remove_hooks` makes it ready for another.

    Args:
        per_token_surprise: (..., L, T, E), floating point, +inf everywhere; entries of routed rows become finite
            (sparse fill). Layers that the model does not have stay as they are: a manager sees those alone that it has.
        apply_w2: the application to wrap.
        kind: what is recorded; a kind that divides by the routing weight is to be divided afterwards.
        apply_w13: the application of gate and up to wrap.
        on_rows: receives each layer's rows with their surprise, in place of `per_token_surprise`.

    Raises:
        ValueError: an unknown kind, a layer applied twice, or a dtype or sizes that are not the model's.
    """

    def __init__(
        self,
        per_token_surprise: Float[Tensor, "*runs layers tokens experts"],
        apply_w2: ApplyW2 = plain_apply_w2,
        kind: SurpriseKind = "w2",
        apply_w13: ApplyW13 = plain_apply_w13,
        *,
        on_rows: OnRows | None = None,
    ) -> None:
        if not per_token_surprise.is_floating_point() or per_token_surprise.ndim < 3:
            raise ValueError(
                "per_token_surprise: expected (layers, tokens, experts) of floating point numbers, got "
                f"{tuple(per_token_surprise.shape)} of {per_token_surprise.dtype}"
            )
        self.per_token_surprise = per_token_surprise
        self._apply_w2, self._apply_w13, self._on_rows = apply_w2, apply_w13, on_rows
        self._points = {point.place: point for point in kind_of(kind).points}
        self._parts = sum(PARTS[place] for place in self._points)
        self._handles: list[RemovableHandle] = []
        self._applied: set[tuple[str, int]] = set()
        self._saved: dict[tuple[str, int], tuple[Tensor, Rows]] = {}  # by place and layer, for its measure
        self._values: dict[int, list[Tensor]] = {}  # by layer: the parts measured so far

    def apply_w2(self, layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        """The wrapped application; hooks its output and saves what the measure needs."""
        self._check("apply_w2", layer, rows)
        y = self._apply_w2(layer, hidden, w2, rows)
        if point := self._points.get("output"):
            self._hook(layer, point, (y,), hidden if point.saves == "hidden" else y, rows)
        return y

    def apply_w13(self, layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The wrapped application of gate and up; hooks what its kind measures there."""
        self._check("apply_w13", layer, rows)
        if point := self._points.get("input"):  # the gradient of a row's input needs a tensor with rows
            x, rows = spread(x, rows)
            self._hook(layer, point, (x,), x, rows)
        outputs = self._apply_w13(layer, x, w1, w3, rows)
        if point := self._points.get("gate_up"):
            self._hook(layer, point, outputs, x, rows)
        return outputs

    def write_rows(self, layer: int, values: Float[Tensor, "*runs rows"], rows: Rows) -> None:
        """Scatter values of rows into the layer's surprise, +inf elsewhere."""
        matrix = self.per_token_surprise.select(-3, layer)
        matrix.copy_(scatter_rows(values.to(matrix.dtype), rows.token, rows.expert, *matrix.shape[-2:]))

    def remove_hooks(self) -> None:
        """Remove the hooks and drop the saved rows, for callers who keep the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for saved in (self._saved, self._values, self._applied):
            saved.clear()

    def _check(self, name: str, layer: int, rows: Rows) -> None:
        *runs, layers, tokens, experts = self.per_token_surprise.shape
        wanted, own = f"layers > {layer}", self._on_rows is None  # rows of others have other tokens and experts
        fits = 0 <= layer < layers
        if own:
            wanted = ", ".join(
                [*map(str, rows.offsets.shape[:-1]), wanted, "tokens", f"{rows.offsets.shape[-1]} experts"]
            )
            fits = fits and (*runs, experts) == rows.offsets.shape
        if fits and own and not self._applied:
            count = _count_tokens(rows)
            wanted, fits = wanted.replace("tokens", f"{count} tokens"), count in (None, tokens)
        if not fits:
            raise ValueError(
                f"per_token_surprise: expected ({wanted}), got {tuple(self.per_token_surprise.shape)}; make it of the "
                "model's sizes"
            )
        if (name, layer) in self._applied:
            raise ValueError(
                f"SurpriseHookManager: expected one forward pass, got layer {layer} again; make a manager for each "
                "pass, or call remove_hooks() between them"
            )
        self._applied.add((name, layer))

    def _hook(self, layer: int, point: HookPoint, tensors: tuple[Tensor, ...], saved: Tensor, rows: Rows) -> None:
        for t in tensors:
            inside, axes = unwrap(t)  # a mapped tensor has no graph of its own
            if inside.requires_grad:
                # Detached: torch.func.grad differentiates with create_graph; an attached norm would tie the graph into
                # a cycle.
                record = lambda grad, axes=axes: self._record(layer, point, rewrap(grad.detach(), axes))  # noqa: E731
                self._handles.append(inside.register_hook(record))
                self._saved[point.place, layer] = saved.detach(), rows

    def _record(self, layer: int, point: HookPoint, grad: Tensor) -> None:
        saved, rows = self._saved[point.place, layer]
        if point.scatter is not None and self._parts == 1 and self._on_rows is None:
            matrix = self.per_token_surprise.select(-3, layer)
            matrix.copy_(point.scatter(saved, grad, rows, *matrix.shape[-2:]))
            return
        values = self._values.setdefault(layer, [])
        values.append(point.measure(saved, grad, rows))
        if len(values) == self._parts:  # the squares of all parts add up
            total, *others = self._values.pop(layer)
            for part in others:
                total = total.hypot(part)
            (self._on_rows or self.write_rows)(layer, total, rows)


def _count_tokens(rows: Rows) -> int | None:
    """Number of tokens behind the rows: every token has some, if inactive ones; None if no value may be read."""
    token = unwrap_all(rows.token)
    if is_traced(token) or token.device.type != "cpu" or not token.numel():
        return None
    return int(token.amax()) + 1
