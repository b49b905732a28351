"""The records in memory: all of a short run, few of a long one, and the same whether it was stopped or not."""

from training.run.context import ENDS, MOST, Best, append_record, best_of, best_step, better


def held(steps: int, scored: dict[int, float] | None = None, first: list[dict] | None = None, begin: int = 1) -> list:
    history = [] if first is None else first
    for step in range(begin, steps + 1):
        nats = (scored or {}).get(step)
        append_record(history, {"step": step} | ({} if nats is None else {"held_out_nats": nats}))
    return history


def test_a_short_run_holds_every_record() -> None:
    assert [record["step"] for record in held(MOST)] == list(range(1, MOST + 1))


def test_a_long_run_holds_few_records_its_ends_and_its_best() -> None:
    history = held(100_000, {50_001: 1.5, 60_001: 1.5, 70_001: 1.6})
    steps = [record["step"] for record in history]
    assert len(steps) <= MOST + 3 * ENDS
    assert steps == sorted({*steps})
    assert steps[:ENDS] == list(range(1, ENDS + 1))
    assert steps[-ENDS:] == list(range(100_001 - ENDS, 100_001))
    assert best_step(history) == 50_001
    gaps = {b - a for a, b in zip(steps[ENDS:-ENDS], steps[ENDS + 1 : -ENDS], strict=False)} - {32 - 1, 1}
    assert max(gaps) == 32, "evenly spaced between the ends"


def test_a_run_that_goes_on_holds_what_it_would_have_held() -> None:
    whole = held(30_000, {4_321: 2.0})
    stopped = held(17_123, {4_321: 2.0})
    read_again: list[dict] = []
    for step in range(1, 17_124):
        append_record(read_again, {"step": step} | ({"held_out_nats": 2.0} if step == 4_321 else {}))
    assert read_again == stopped
    assert held(30_000, first=read_again, begin=17_124) == whole


def test_the_best_score_so_far_stays_the_best_of_a_process_that_has_no_earlier_records() -> None:
    """Rank 0 alone reads the record of a resumed run; all ranks must save at the same steps."""
    history = [{"step": 3, "held_out_nats": 1.5}, {"step": 4}, {"step": 6, "held_out_nats": None}]
    best = best_of(history)
    assert best == Best(3, 1.5)
    assert better(best, {"step": 9, "held_out_nats": 1.5}) == best
    assert better(best, {"step": 9}) == best
    assert better(best, {"step": 9, "held_out_nats": 1.4}) == Best(9, 1.4)
    assert best_of([]) is None
