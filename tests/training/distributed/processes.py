"""Many processes for tests: each runs the same function, and what goes wrong in one is said here."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import ROOT, example, spread_params, tiny_batch, tiny_config
from tests.training.step.test_hyper_step import HYPER, as_double
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import tree_map
from training import Batch, Rule, TrainState, hyper_step, init_state
from training.distributed.collectives import Group
from training.distributed.layout import layout_of, own_state, whole_state
from training.distributed.parallel_step import parallel_step
from training.distributed.sharded_checkpoint import load_sharded, open_sharded, save_sharded
from training.step.rules import LEAST_SURPRISE

FIXED, DYNAMIC = tiny_config(num_experts_per_tok=3), tiny_config()
CROWDED = tiny_config(num_experts_per_tok=2)  # all tokens visit the first two experts, and no row the other process
TRICKS = {
    "plain": (FIXED, HYPER, {}),
    "budget, coupling, exploration": (
        DYNAMIC,
        HYPER._replace(router_coupling=0.6, explore_prob=0.4, target_temperature=0.5, surprise_until=5, pi_alpha=0.4),
        {},
    ),
    "regenerate": (FIXED, HYPER._replace(regenerate_below=0.9, beta2=0.5), {}),
    "experts": (FIXED, HYPER, {"kind": "experts"}),
    "input": (FIXED, HYPER, {"kind": "input"}),
    "benefit": (FIXED, HYPER._replace(backbone_lr_scale=0.3), {"kind": "benefit"}),
    "crowded": (CROWDED, HYPER, {}),
    "stable, shared expert": (
        tiny_config(num_experts_per_tok=3, routing="stable", shared_expert_intermediate_size=5),
        HYPER._replace(table_step=2, router_coupling=0.6),
        {},
    ),
    "k-means, sigmoid": (tiny_config(num_experts_per_tok=3, routing="kmeans", gate="sigmoid"), HYPER, {}),
    "bfloat16": (FIXED, HYPER, {"compute_dtype": torch.bfloat16}),
    "in parts": (FIXED, HYPER._replace(explore_prob=0.4), {"parts": 2}),
    "own rule in parts": (FIXED, HYPER, {"rule": example("average_surprise_of_a_token").RULE, "parts": 2}),
    "own rule": (FIXED, HYPER, {"rule": example("average_surprise_of_a_token").RULE}),
}
LAYOUTS = {"data": (False, 1), "optimizer": (True, 1), "experts": (False, 2), "both": (True, 2)}  # (ZeRO-1, experts)
CASES = {
    2: [
        *((trick, "data") for trick in TRICKS),
        *((trick, "experts") for trick in TRICKS if trick != "regenerate"),
        ("plain", "optimizer"), ("benefit", "optimizer"), ("benefit", "both"),
    ],
    4: [("plain", layout) for layout in LAYOUTS] + [("budget, coupling, exploration", "both")],
}  # fmt: skip
STEPS, ROWS = 3, 4
RULE = example("average_surprise_of_a_token").RULE
SAVED = ("optimizer", "experts", "both")
ABOUT: dict = {"config_dict": asdict(FIXED), "tokenizer": "bytes", "settings": {}}


def a_state(config: ModelConfig, rule: Rule = LEAST_SURPRISE) -> TrainState:
    fresh = init_state(config, torch.Generator().manual_seed(0), rule)
    moments = [opt._replace(mu=as_double(opt.mu), nu=as_double(opt.nu)) for opt in (fresh.expert_opt, fresh.router_opt)]
    params = spread_params(config, router_gain=3.0)
    if config is CROWDED:
        params["layers"]["moe"]["router_bias"][:, :2] += 10.0
    return TrainState(params, *moments, fresh.step, tree_map(Tensor.double, fresh.rule))


def a_batch(step: int) -> Batch:
    """Rows that differ in padding and in targets; the last one predicts nothing."""
    batch = tiny_batch(FIXED, ROWS, 6, step, left=(0, 2, 4), right=(1,), unlabelled=0.3)
    labels = batch.labels.clone()
    labels[-1] = -100
    return batch._replace(labels=labels)


def rule_of(statics: dict) -> dict:
    return {key: value for key, value in statics.items() if key == "rule"}


@cache
def alone(trick: str) -> tuple[TrainState, list]:
    """What one process makes of it."""
    config, hyper, statics = TRICKS[trick]
    statics = {key: value for key, value in statics.items() if key != "parts"}
    return _train(
        lambda state, batch: hyper_step(state, batch, hyper, config, **statics),
        a_state(config, **rule_of(statics)),
        lambda b: b,
    )


def together(trick: str, layout_name: str, world: Group) -> tuple[TrainState, list, dict[str, int]]:
    """What this process, with the others, makes of it: the whole state, the metrics, the bytes it sent."""
    config, hyper, statics = TRICKS[trick]
    zero, experts = LAYOUTS[layout_name]
    layout = layout_of(world, zero, experts)
    each = ROWS // world.size

    def rows(batch: Batch) -> Batch:
        return Batch(*(part[world.rank * each : (world.rank + 1) * each] for part in batch))

    state = own_state(a_state(config, **rule_of(statics)), config, layout)
    world.sent.clear()
    state, metrics = _train(
        lambda state, batch: parallel_step(state, batch, hyper, config, layout, **statics), state, rows
    )
    sent = dict(world.sent)
    return whole_state(state, config, layout), metrics, sent


@cache
def trained() -> TrainState:
    """A state in float32, as runs have it, whose numbers all differ."""
    state = init_state(FIXED, torch.Generator().manual_seed(0))
    for number in range(STEPS):
        state, _ = hyper_step(state, a_batch(number), HYPER, FIXED)
    return state


def with_a_rule() -> TrainState:
    """The same with a rule that has a state of its own."""
    rule = {name: torch.arange(table.numel()).reshape(table.shape) for name, table in RULE.init(FIXED).items()}
    return trained()._replace(rule=rule | {"looks": torch.tensor(7, dtype=torch.int32), "on": torch.tensor(True)})


def _rule_state(config: ModelConfig) -> dict[str, Tensor]:
    return {name: torch.zeros_like(leaf) for name, leaf in with_a_rule().rule.items()}


SAVED_RULE = RULE._replace(init=_rule_state)


def _train(step, state, rows) -> tuple[TrainState, list]:
    metrics = []
    for number in range(STEPS):
        state, measured = step(state, rows(a_batch(number)))
        metrics.append(measured)
    return state, metrics


def main(folder: Path, rank: int, size: int) -> None:
    """One process: every case, one file each."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if size == 3:
        _pass_on(folder, Group(dist.group.WORLD, size=size, rank=rank))
        dist.destroy_process_group()
        return
    for trick, layout in CASES[size]:
        world = Group(dist.group.WORLD, size=size, rank=rank)
        torch.save(together(trick, layout, world), folder / f"{trick} {layout} {rank}.pt")
    world = Group(dist.group.WORLD, size=size, rank=rank)
    for name, (zero, experts) in LAYOUTS.items():
        layout = layout_of(world, zero, experts)
        if layout.is_sharded:
            save_sharded(folder / name, own_state(trained(), FIXED, layout), FIXED, layout, ABOUT, 2, None)
    layout = layout_of(world, True, 2)
    save_sharded(folder / "rule", own_state(with_a_rule(), FIXED, layout), FIXED, layout, ABOUT, 2, None)
    for name in SAVED if size == 4 else ():  # what two processes saved, read by four
        for other, (zero, experts) in LAYOUTS.items():
            layout = layout_of(world, zero, experts)
            there = open_sharded(folder.parent / "2" / name / "sharded" / f"step_{STEPS:06d}")
            state = whole_state(load_sharded(there, FIXED, layout), FIXED, layout)
            torch.save(state, folder / f"{name} as {other} {rank}.pt")
    dist.destroy_process_group()


def _pass_on(folder: Path, world: Group) -> None:
    """Three processes load what two have saved, and save it again."""
    layout = layout_of(world, True, 1)
    for name in (*SAVED, "rule"):
        there = open_sharded(folder.parent / "2" / name / "sharded" / f"step_{STEPS:06d}")
        rule = SAVED_RULE if name == "rule" else LEAST_SURPRISE
        save_sharded(folder / name, load_sharded(there, FIXED, layout, rule), FIXED, layout, ABOUT, 2, None)


def ended(begun: "list[subprocess.Popen[str]]", seconds: float = 120.0) -> list[subprocess.CompletedProcess[str]]:
    """What became of processes that run side by side; all of them are ended when the time is up."""
    end = time.monotonic() + seconds
    try:
        texts = [process.communicate(timeout=max(1.0, end - time.monotonic())) for process in begun]
    except subprocess.TimeoutExpired:
        for process in begun:
            process.kill()
        texts = [process.communicate() for process in begun]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *text)
        for process, text in zip(begun, texts, strict=True)
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(folder: Path, size: int) -> None:
    """Every case on that many processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    commands = [
        [sys.executable, "-m", "tests.training.distributed.processes", str(folder), str(rank), str(size)]
        for rank in range(size)
    ]
    done = ended([subprocess.Popen(c, env=env, text=True, stderr=subprocess.PIPE) for c in commands])
    assert all(process.returncode == 0 for process in done), "\n".join(process.stderr[-2000:] for process in done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
