"""Join the processes of a torchrun launch to one team."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from training.distributed.collectives import Group, PeerLost
from training.distributed.layout import Layout, layout_of
from training.distributed.rendezvous import (
    RankInfo,
    ReportedByAnotherRank,
    cause_is_reported,
    join_rendezvous,
    leave,
    rank_from_environment,
    report_cause,
)
from training.distributed.team import ALONE, Team, connected
from training.errors import UserError
from training.run.config import RunConfig, hyper_params
from training.run.identity import facts_of
from training.step.hyper_params import is_off


@contextmanager
def open_team(prepare: Callable[[], tuple[RunConfig, bool]]) -> Iterator[tuple[Team, RunConfig, bool]]:
    """The processes of a run, its settings, and whether it goes on; ends what it began.

    Args:
        prepare: settings and `resume` from the command line; what it raises is said by one process only.

    Raises:
        UserError: a bad setup, on all processes; it has a text on one.
    """
    rank_info = rank_from_environment()
    if rank_info is None:
        config, resume = prepare()
        check_sizes(config, 1)
        yield ALONE, config, resume
        return
    begun, prepared, wrong = time.monotonic(), None, None
    try:
        prepared = prepare()
        check_sizes(prepared[0], rank_info.size)
    except (UserError, ValueError) as error:
        wrong = UserError(str(error))
    met = join_rendezvous(rank_info, wrong or facts_of(*prepared), begun)  # type: ignore[misc]
    assert prepared is not None, "who has none has said so in the meeting"
    config, resume = prepared
    try:
        with connected(rank_info, met.store):
            team = Team(_layout(rank_info, config), rank_info.local_rank, met.restarts)
            yield team, config, resume
    except PeerLost as error:
        is_reported = cause_is_reported(met.store)
        leave(met.store, rank_info)
        raise (ReportedByAnotherRank() if is_reported else error) from None
    except BaseException as error:
        first = report_cause(met.store)
        leave(met.store, rank_info)
        if isinstance(error, UserError) and not first:
            raise ReportedByAnotherRank from None
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
        (config.batch_size % (processes * config.accumulate) == 0, "accumulate",
         f"a divisor of the rows of a process ({config.batch_size // processes})", config.accumulate),
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


def _layout(rank_info: RankInfo, config: RunConfig) -> Layout:
    if rank_info.size == 1:
        return ALONE.layout
    world = Group(dist.group.WORLD, size=rank_info.size, rank=rank_info.rank)
    return layout_of(world, config.shard_optimizer, config.shard_experts)
