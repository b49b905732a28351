"""One run on many processes: `torchrun --nnodes N --nproc-per-node P -m training train ...`.

Every process makes the same program's steps on its own rows of each batch (`training.parallel_step`). Process 0 alone
writes: lock, records, checkpoints, pictures, progress. `team.world.sent` counts the bytes that this process has sent
since the run began, by purpose, as `training.collectives` says; summary.json has them per step as `bytes_sent`.

Without torchrun's environment variables there is one process, and nothing of this is at work.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from training.collectives import Group, Lost
from training.continuity import facts_of
from training.errors import UserError
from training.meeting import Place, ToldElsewhere, find_place, is_told, leave, meet, say_cause
from training.parallel_step import Layout, own_state, whole_state
from training.run_config import RunConfig, hyper_params
from training.step.batch import Batch
from training.step.hyper_params import is_off
from training.step.hyper_step import TrainState

SILENCE = timedelta(minutes=30)  # that a process may keep while others wait for it, as while one scores
T = TypeVar("T")


class Team(NamedTuple):
    """The processes of a run, as one of them sees them."""

    layout: Layout
    local_rank: int = 0  # among those of this machine
    restarts: int = 0  # how often torchrun has begun again

    @property
    def world(self) -> Group:
        return self.layout.world

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.world.rank == 0

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        each = batch.input_ids.shape[0] // self.world.size
        return Batch(*(part[self.world.rank * each : (self.world.rank + 1) * each] for part in batch))

    def whole(self, state: TrainState, config: RunConfig) -> TrainState:
        """The whole state; all processes must ask."""
        return whole_state(state, config.model, self.layout)

    def own(self, state: TrainState, config: RunConfig) -> TrainState:
        """This process's part of process 0's state; the others' may be of any content."""
        return own_state(self.world.copy_first(state), config.model, self.layout)

    def one_by_one(self, work: Callable[[], T]) -> T:
        """The work of every process, the first of each machine before the others, who find what it left on the disk."""
        if self.local_rank == 0:
            done = work()
            self.world.wait_for_all()
        else:
            self.world.wait_for_all()
            done = work()
        return done


ALONE = Team(Layout(Group(), Group(), Group()))


@contextmanager
def open_team(prepare: Callable[[], tuple[RunConfig, bool]]) -> Iterator[tuple[Team, RunConfig, bool]]:
    """The processes of a run, its settings, and whether it goes on; ends what it began.

    Args:
        prepare: settings and `resume` from the command line; what it raises is said by one process only.

    Raises:
        UserError: a bad setup, on all processes; it has a text on one.
    """
    place = find_place()
    if place is None:
        config, resume = prepare()
        check_sizes(config, 1)
        yield ALONE, config, resume
        return
    begun, prepared, wrong = time.monotonic(), None, None
    try:
        prepared = prepare()
        check_sizes(prepared[0], place.size)
    except (UserError, ValueError) as error:
        wrong = UserError(str(error))
    met = meet(place, wrong or facts_of(*prepared), begun)  # type: ignore[misc]
    assert prepared is not None, "who has none has said so in the meeting"
    config, resume = prepared
    try:
        with _connected(place, met.store):
            team = Team(_layout(place, config), place.local_rank, met.restarts)
            yield team, config, resume
    except Lost as error:
        told = is_told(met.store)
        leave(met.store, place)
        raise (ToldElsewhere() if told else error) from None
    except BaseException as error:
        first = say_cause(met.store)
        leave(met.store, place)
        if isinstance(error, UserError) and not first:
            raise ToldElsewhere from None
        raise


def check_sizes(config: RunConfig, processes: int) -> None:
    """Refuse what cannot be spread over that many processes.

    Raises:
        UserError: one line that names the setting.
    """
    hyper, experts = hyper_params(config), config.shard_experts
    sharded = processes > 1 and (config.shard_optimizer or experts > 1)
    rules: tuple[tuple[bool, str, str, Any], ...] = (
        (config.batch_size % processes == 0, "batch_size", f"a multiple of the processes ({processes})",
         config.batch_size),
        (processes % experts == 0, "shard_experts", f"a divisor of the processes ({processes})", experts),
        (config.model.num_experts % experts == 0, "model.num_experts", f"a multiple of shard_experts ({experts})",
         config.model.num_experts),
        (processes == 1 or not config.compile, "compile", "false on several processes", config.compile),
        (processes == 1 or is_off(hyper.expert_norm), "hyper.expert_norm", "0 on several processes",
         hyper.expert_norm),
        (processes == 1 or is_off(hyper.shuffle_targets), "hyper.shuffle_targets", "0 on several processes",
         hyper.shuffle_targets),
        (processes == 1 or config.surprise_kind != "oracle", "surprise_kind", "no oracle on several processes",
         config.surprise_kind),
        (not sharded or is_off(hyper.regenerate_below), "hyper.regenerate_below",
         "0 with shard_optimizer or shard_experts", hyper.regenerate_below),
    )  # fmt: skip
    for fine, key, wanted, came in rules:
        if not fine:
            raise UserError(f"{key}: expected {wanted}, got {came}; change it, or the number of processes")


@contextmanager
def _connected(place: Place, store: Any) -> Iterator[None]:
    """torch.distributed, where there is more than one process: gloo for tensors on the CPU, nccl on CUDA."""
    if place.size == 1:
        yield
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if both else "gloo", store=store, rank=place.rank, world_size=place.size, timeout=SILENCE
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _layout(place: Place, config: RunConfig) -> Layout:
    if place.size == 1:
        return ALONE.layout
    world = Group(dist.group.WORLD, size=place.size, rank=place.rank)
    return layout_of(world, config.shard_optimizer, config.shard_experts)


def layout_of(world: Group, shard_optimizer: bool, shard_experts: int) -> Layout:
    """Neighbours in rank, so on one machine as far as possible, hold the experts of a layer together."""
    copies = world.size // shard_experts
    copy, share = divmod(world.rank, shard_experts)
    together = [list(range(c * shard_experts, (c + 1) * shard_experts)) for c in range(copies)]
    same = [list(range(s, world.size, shard_experts)) for s in range(shard_experts)]
    experts, replicas = (
        [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in groups] for groups in (together, same)
    )
    return Layout(
        world,
        Group(experts[copy], size=shard_experts, rank=share, sent=world.sent),
        Group(replicas[share], size=copies, rank=copy, sent=world.sent),
        shard_optimizer,
    )
