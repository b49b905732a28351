"""One run on many processes: `torchrun --nnodes N --nproc-per-node P -m training train ...`.

Every process makes the same program's steps on its own rows of each batch (`parallel_step`). Process 0 alone writes:
lock, records, checkpoints, pictures, progress. `team.world.sent` counts the bytes that this process has sent since the
run began, by purpose, as `collectives` says; summary.json has them per step as `bytes_sent`.

Without torchrun's environment variables there is one process, and nothing of this is at work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from tiny_onn_func.config import ModelConfig
from training.distributed.collectives import Group
from training.distributed.layout import Layout, own_state, whole_state
from training.distributed.rendezvous import RankInfo
from training.step.batch import Batch
from training.step.hyper_step import TrainState

SILENCE = timedelta(minutes=30)  # that a process may keep while others wait for it, as while one scores
T = TypeVar("T")


class Team(NamedTuple):
    """Ranks of a run, as one of them sees them."""

    layout: Layout
    local_rank: int = 0  # among those of this machine
    restarts: int = 0  # how often torchrun has begun again

    @property
    def world(self) -> Group:
        return self.layout.world

    @property
    def first(self) -> bool:
        """True on the rank that writes."""
        return self.world.rank == 0

    def rows(self, batch: Batch) -> Batch:
        """This rank's rows of a batch."""
        each = batch.input_ids.shape[0] // self.world.size
        return Batch(*(part[self.world.rank * each : (self.world.rank + 1) * each] for part in batch))

    def whole(self, state: TrainState, config: ModelConfig) -> TrainState:
        """Gather the whole state; all ranks must call."""
        return whole_state(state, config, self.layout)

    def own(self, state: TrainState, config: ModelConfig) -> TrainState:
        """This rank's part of the state of rank 0; the states of the other ranks may hold anything."""
        return own_state(self.world.broadcast(state), config, self.layout)

    def one_by_one(self, work: Callable[[], T]) -> T:
        """Run `work` on local rank 0 first, then on the other ranks, which reuse its files on the disk."""
        if self.local_rank == 0:
            done = work()
            self.world.barrier()
        else:
            self.world.barrier()
            done = work()
        return done


ALONE = Team(Layout(Group(), Group(), Group()))


@contextmanager
def connected(rank_info: RankInfo, store: Any) -> Iterator[None]:
    """Initialise torch.distributed if there is more than one process: gloo for CPU tensors, nccl for CUDA."""
    if rank_info.size == 1:
        yield
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if both else "gloo",
        store=store,
        rank=rank_info.rank,
        world_size=rank_info.size,
        timeout=SILENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
