"""Rendezvous of a run's ranks: all are present and alike, or all end with one line that says why.

torchrun, or any launcher that sets the same environment variables, gives each process its rank and the address of a
key-value store, in which every process leaves a note of itself. Process 0 reads all notes and calls the round; a
process that finds its own note in it answers. A store may hold notes of an earlier round, of processes that were
killed: they never answer.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from training.errors import UserError
from training.storage.plain_yaml import shown

PATIENCE = 20.0  # seconds in which all processes must have come
ROUND, CAUSE = "round", "cause"  # names of notes: that of process 0, that of a process that ends with an error


class ReportedByAnotherRank(UserError):
    """Another rank reports the error; this one ends without a message."""

    def __init__(self) -> None:
        super().__init__("")


class RankInfo(NamedTuple):
    """Rank, world size and store of this process, from its environment."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    hosted: bool  # True if torchrun's agent keeps the store
    restarts: int

    @property
    def keeps_store(self) -> bool:
        return self.rank == 0 and not self.hosted


class Rendezvous(NamedTuple):
    """Result of a rendezvous that all ranks have joined."""

    store: Any  # of this round alone
    restarts: int  # the most that any process knows of


def rank_from_environment() -> RankInfo | None:
    """Read torchrun's environment variables; None if this process is the only one.

    Raises:
        UserError: a variable is missing or no number.
    """
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise UserError(f"RANK: expected 0 to WORLD_SIZE - 1 ({size - 1}), got {rank}; start with torchrun")
    return RankInfo(
        rank, size, _number("LOCAL_RANK") if "LOCAL_RANK" in env else rank, env.get("MASTER_ADDR", ""), port,
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )  # fmt: skip


def join_rendezvous(rank_info: RankInfo, facts: Mapping[str, Any] | UserError, begun: float) -> Rendezvous:
    """Wait until all ranks are present, and compare the facts that decide their numbers.

    Args:
        facts: name -> value of what must be the same on all; or what is wrong with this process.
        begun: time.monotonic() of the start, from which on `PATIENCE` counts.

    Raises:
        UserError: the store is out of reach or its port in use, a process is missing, fails or differs. It has a text
            on one process only, unless they cannot talk to each other.
    """
    store = _store(rank_info, begun + PATIENCE)
    own: dict[str, Any] = {"nonce": uuid.uuid4().hex, "restarts": rank_info.restarts}
    if isinstance(facts, UserError):
        own["wrong"] = str(facts)
    else:
        text = json.dumps(dict(facts), sort_keys=True, default=str)
        own["digest"] = hashlib.sha256(text.encode()).hexdigest()
        store.set(f"facts/{own['digest']}", text)
    store.set(f"note/{rank_info.rank}", json.dumps(own))
    try:
        rounds = (
            _call(store, rank_info, begun + PATIENCE) if rank_info.rank == 0 else _answer(store, rank_info, own, begun)
        )
        notes = rounds["notes"]
        _check_notes(store, rank_info, notes)
    except UserError:
        leave(store, rank_info)
        raise
    except RuntimeError:
        raise UserError("WORLD_SIZE: expected to meet rank 0, which has ended; see what it said, or start it") from None
    own_store = dist.PrefixStore(rounds["id"], store)  # type: ignore[attr-defined]
    return Rendezvous(own_store, max(note["restarts"] for note in notes))


def report_cause(store: Any) -> bool:
    """Leave a note that this rank reports why it ends; True if it is the first to do so."""
    try:
        return bool(store.add(CAUSE, 1) == 1)
    except RuntimeError:  # whoever kept the store is gone
        return True


def leave(store: Any, rank_info: RankInfo, seconds: float = 3.0) -> None:
    """Sign off before an end with an error: the rank that keeps the store waits until the others have read in it."""
    end = time.monotonic() + seconds
    try:
        store.set(f"farewell/{rank_info.rank}", "")
        while rank_info.keeps_store and time.monotonic() < end:
            if store.check([f"farewell/{rank}" for rank in range(rank_info.size)]):
                return
            time.sleep(0.05)
    except RuntimeError:
        return


def cause_is_reported(store: Any, seconds: float = 2.0) -> bool:
    """True if another rank has reported why it ended; waits a little for its note."""
    end = time.monotonic() + seconds
    try:
        while not store.check([CAUSE]):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    except RuntimeError:
        return False
    return True


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(
            f"{name}: expected a number in the environment, got {text!r}; start with torchrun, which sets it"
        )
    return int(text)


def _store(rank_info: RankInfo, deadline: float) -> Any:
    """Connect to the store, by a plain socket first: the library's own messages about a failure are long."""
    keeps, where = rank_info.keeps_store, f"{rank_info.address}:{rank_info.port}"
    try:
        if keeps:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", rank_info.port))
        else:
            _reach(rank_info, deadline)
        left = max(1.0, deadline - time.monotonic())
        return dist.TCPStore(  # type: ignore[attr-defined]
            rank_info.address, rank_info.port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=left)
        )
    except OSError as error:
        mend = "choose another port" if keeps else "is that process 0's address, is its port open, has it begun?"
        raise UserError(f"{where}: expected to {'listen' if keeps else 'meet the others'} there, got: "
                        f"{error.strerror or error}; {mend}") from None  # fmt: skip
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: expected torch's store there, got: {reason}; choose another port") from None


def _reach(rank_info: RankInfo, deadline: float) -> None:
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((rank_info.address, rank_info.port), timeout=max(0.1, left)).close()
            return
        except OSError:
            if left < 0.5:
                raise
            time.sleep(0.2)


def _call(store: Any, rank_info: RankInfo, deadline: float) -> dict[str, Any]:
    """Call a round on rank 0 for each new full set of notes, until all ranks of one have answered."""
    called: dict[str, Any] = {"notes": []}
    names = [f"note/{rank}" for rank in range(rank_info.size)]
    while True:
        there = [store.check([name]) for name in names]
        notes = [json.loads(store.get(name)) if present else None for name, present in zip(names, there, strict=True)]
        if all(there) and notes != called["notes"]:
            called = {"id": uuid.uuid4().hex, "notes": notes}
            store.set(ROUND, json.dumps(called))
        answers = [f"{called.get('id')}/{rank}" for rank in range(1, rank_info.size)]
        answered = [all(there) and store.check([name]) for name in answers]
        if all(there) and all(answered):
            store.set(f"{called['id']}/go", "")
            return called
        if time.monotonic() > deadline:
            missing = [rank for rank, present in enumerate(there) if not present]
            missing = missing or [rank for rank, replied in enumerate(answered, 1) if not replied]
            store.set(ROUND, json.dumps({"id": "", "notes": notes}))
            raise UserError(
                f"WORLD_SIZE: expected {rank_info.size} processes within {PATIENCE:.0f} s, got none of rank "
                f"{', '.join(map(str, missing[:8]))}; start all of them with the same command"
            )
        time.sleep(0.05)


def _answer(store: Any, rank_info: RankInfo, own: Mapping[str, Any], begun: float) -> dict[str, Any]:
    """Answer, on the other ranks, every round that holds this rank's note, until one is closed."""
    while time.monotonic() < begun + PATIENCE + 3:  # process 0 says first who is missing
        if store.check([ROUND]):
            called: dict[str, Any] = json.loads(store.get(ROUND))
            if own in called["notes"]:
                if not called["id"]:
                    raise ReportedByAnotherRank
                store.set(f"{called['id']}/{rank_info.rank}", "")
                if store.check([f"{called['id']}/go"]):
                    return called
        time.sleep(0.05)
    raise UserError(
        f"WORLD_SIZE: expected {rank_info.size} processes within {PATIENCE:.0f} s, got none of rank 0; start it"
    )


def _check_notes(store: Any, rank_info: RankInfo, notes: list[dict[str, Any]]) -> None:
    """Reach the same verdict on every rank; the rank at fault, or rank 0, reports it."""
    for rank, note in enumerate(notes):
        if "wrong" in note:
            raise UserError(note["wrong"]) if rank == rank_info.rank else ReportedByAnotherRank
    for rank, note in enumerate(notes):
        if note["digest"] != notes[0]["digest"]:
            if rank_info.rank:
                raise ReportedByAnotherRank
            first, other = (json.loads(store.get(f"facts/{n['digest']}")) for n in (notes[0], note))
            name = next(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
            raise UserError(
                f"{name}: expected {shown(first.get(name))}, as on rank 0, on every rank, got {shown(other.get(name))} "
                f"on rank {rank}; start all with the same command and the same installation"
            )
