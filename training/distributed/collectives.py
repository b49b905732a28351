"""Collectives (all_reduce, all_to_all, ...) that count the bytes sent and report a lost peer in one line.

All of it stays outside torch.func transforms, where a collective is refused or, worse, does nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tiny_onn_func.tree import leaves, tree_map
from training.errors import UserError


class PeerLost(UserError):
    """Another process of the run is gone, or does not answer."""


class Group:
    """Process group that contains this rank; a group of one sends nothing.

    `sent` counts, by purpose, the bytes that this process sends: of an exchange those that go to others, of the rest
    the least that any algorithm needs, which is what a ring sends: for n bytes and P processes (P - 1) / P * n for a
    gather of n in all or a scattered sum of n, twice that for a sum.
    """

    def __init__(self, handle: Any = None, *, size: int = 1, rank: int = 0, sent: Counter[str] | None = None) -> None:
        """`handle` is a process group of torch.distributed; `size` and `rank` are those in it."""
        self.handle, self.size, self.rank = handle, size, rank
        self.sent: Counter[str] = Counter() if sent is None else sent

    def all_reduce_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Begin the sum of the ranks' tensors of one shape; the returned function waits for it."""
        if self.size == 1:
            return lambda: part
        total = part.detach().clone()
        self._count(purpose, 2 * total.nbytes)
        with _naming():
            work = dist.all_reduce(total, group=self.handle, async_op=True)

        def wait() -> Tensor:
            with _naming():
                work.wait()
            return total

        return wait

    def all_reduce(self, part: Tensor, purpose: str) -> Tensor:
        """Sum of the ranks' tensors of one shape."""
        return self.all_reduce_async(part, purpose)()

    def all_reduce_tree(self, part: Any, purpose: str) -> Any:
        """Sum every leaf of a tree in one message, as float64 where there are integers, exact up to 2**53."""
        if self.size == 1:
            return part
        own = leaves(part)
        wide = torch.float64 if any(not leaf.is_floating_point() for leaf in own) else own[0].dtype
        total = self.all_reduce(torch.cat([leaf.detach().reshape(-1).to(wide) for leaf in own]), purpose)
        pieces = iter(total.split([leaf.numel() for leaf in own]))
        return tree_map(lambda leaf: next(pieces).reshape(leaf.shape).to(leaf.dtype), part)

    def reduce_scatter_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Begin the sum of vectors of size * n entries; the returned function waits for this rank's n entries."""
        if self.size == 1:
            return lambda: part
        out = part.new_empty(part.shape[0] // self.size)
        self._count(purpose, part.nbytes)
        with _naming():
            work = dist.reduce_scatter(out, list(part.detach().chunk(self.size)), group=self.handle, async_op=True)

        def wait() -> Tensor:
            with _naming():
                work.wait()
            return out

        return wait

    def all_gather(self, part: Tensor, purpose: str) -> Tensor:
        """Concatenate the ranks' tensors of one shape along the first axis."""
        if self.size == 1:
            return part
        whole = part.new_empty(part.shape[0] * self.size, *part.shape[1:])
        self._count(purpose, whole.nbytes)
        with _naming():
            dist.all_gather(list(whole.chunk(self.size)), part.detach().contiguous(), group=self.handle)
        return whole

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], purpose: str) -> Tensor:
        """Send the first `sent[0]` rows to rank 0, the next to rank 1, ...; the received rows, in the same order."""
        if self.size == 1:
            return rows
        out = rows.new_empty(sum(received), *rows.shape[1:])
        row_bytes = rows[:1].nbytes if rows.shape[0] else 0
        self.sent[purpose] += row_bytes * (sum(sent) - sent[self.rank])
        with _naming():
            dist.all_to_all_single(out, rows.detach().contiguous(), list(received), list(sent), group=self.handle)
        return out

    def broadcast_object(self, value: Any) -> Any:
        """Value of rank 0, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        with _naming():
            dist.broadcast_object_list(box, group=self.handle, group_src=0)
        return box[0]

    def broadcast(self, tree: Any) -> Any:
        """Tensors of rank 0, on every rank; the trees of the other ranks give the shapes."""
        if self.size == 1:
            return tree

        def copied(leaf: Tensor) -> Tensor:
            same = leaf.detach().clone()
            with _naming():
                dist.broadcast(same, group=self.handle, group_src=0)
            return same

        return tree_map(copied, tree)

    def barrier(self) -> None:
        """Wait until every rank has arrived."""
        if self.size > 1:
            with _naming():
                dist.barrier(group=self.handle)

    def _count(self, purpose: str, nbytes: int) -> None:
        self.sent[purpose] += nbytes * (self.size - 1) // self.size


@contextmanager
def _naming() -> Iterator[None]:
    """Turn the library's error about a broken connection into a PeerLost of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise PeerLost(
            f"expected an answer of every process, got: {reason}; one has ended or is out of reach, see what it said; "
            "`torchrun --max-restarts N` begins again from the last checkpoint"
        ) from None
