"""What processes say to each other: sums, gathers and exchanges that count what they send and name what broke.

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
    """Some processes of a run, this one among them; a group of one says nothing to anybody.

    `sent` counts, by purpose, the bytes that this process sends: of an exchange those that go to others, of the rest
    the least that any algorithm needs, which is what a ring sends: for n bytes and P processes (P - 1) / P * n for a
    gather of n in all or a scattered sum of n, twice that for a sum.
    """

    def __init__(self, handle: Any = None, *, size: int = 1, rank: int = 0, sent: Counter[str] | None = None) -> None:
        """`handle` is a process group of torch.distributed; `size` and `rank` are those in it."""
        self.handle, self.size, self.rank = handle, size, rank
        self.sent: Counter[str] = Counter() if sent is None else sent

    def all_reduce_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Begin to add up the processes' tensors of one shape; what is returned waits for the sum."""
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
        """The sum of the processes' tensors of one shape."""
        return self.all_reduce_async(part, purpose)()

    def all_reduce_tree(self, part: Any, purpose: str) -> Any:
        """The same for every leaf of a tree, in one message: of float64 where there are integers, exact up to 2**53."""
        if self.size == 1:
            return part
        own = leaves(part)
        wide = torch.float64 if any(not leaf.is_floating_point() for leaf in own) else own[0].dtype
        total = self.all_reduce(torch.cat([leaf.detach().reshape(-1).to(wide) for leaf in own]), purpose)
        pieces = iter(total.split([leaf.numel() for leaf in own]))
        return tree_map(lambda leaf: next(pieces).reshape(leaf.shape).to(leaf.dtype), part)

    def reduce_scatter_async(self, part: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Begin to add up vectors of size * n entries; each process waits for its n entries of the sum."""
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
        """The processes' tensors of one shape, one behind the other."""
        if self.size == 1:
            return part
        whole = part.new_empty(part.shape[0] * self.size, *part.shape[1:])
        self._count(purpose, whole.nbytes)
        with _naming():
            dist.all_gather(list(whole.chunk(self.size)), part.detach().contiguous(), group=self.handle)
        return whole

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], purpose: str) -> Tensor:
        """The first `sent[0]` rows go to process 0, the next ones to process 1, ...; what came, in the same order."""
        if self.size == 1:
            return rows
        out = rows.new_empty(sum(received), *rows.shape[1:])
        row_bytes = rows[:1].nbytes if rows.shape[0] else 0
        self.sent[purpose] += row_bytes * (sum(sent) - sent[self.rank])
        with _naming():
            dist.all_to_all_single(out, rows.detach().contiguous(), list(received), list(sent), group=self.handle)
        return out

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0, on all."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        with _naming():
            dist.broadcast_object_list(box, group=self.handle, group_src=0)
        return box[0]

    def broadcast(self, tree: Any) -> Any:
        """The tensors of process 0, on all; the other processes' trees say of what shapes they are."""
        if self.size == 1:
            return tree

        def copied(leaf: Tensor) -> Tensor:
            same = leaf.detach().clone()
            with _naming():
                dist.broadcast(same, group=self.handle, group_src=0)
            return same

        return tree_map(copied, tree)

    def barrier(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            with _naming():
                dist.barrier(group=self.handle)

    def _count(self, purpose: str, nbytes: int) -> None:
        self.sent[purpose] += nbytes * (self.size - 1) // self.size


@contextmanager
def _naming() -> Iterator[None]:
    """What the library says of a broken connection, as one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise PeerLost(
            f"expected an answer of every process, got: {reason}; one has ended or is out of reach, see what it said; "
            "`torchrun --max-restarts N` begins again from the last checkpoint"
        ) from None
