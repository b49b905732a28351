"""The router of a run's first step: transplanted from a finished run, or a table filled from its text."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import assert_same_bits
from tiny_onn_func import ModelConfig, save_pretrained
from tiny_onn_func.tree import flatten, partition
from training.cli import main
from training.data.corpus import open_corpus
from training.data.token_table import balanced_table, token_counts
from training.errors import UserError
from training.run.config import RunConfig
from training.run.finished import open_run
from training.run.initial_state import first_state, with_router
from training.step.hyper_params import HyperParams
from training.step.hyper_step import init_state

MODEL = ModelConfig(257, 16, 2, 2, 1, 8, 8, 4, num_experts_per_tok=2)
TABLE = replace(MODEL, routing="hash", hash_key="table")
WORDS = "--steps 3 --batch-size 2 --sequence-length 16 --eval-every 0 --picture-every 0 --sample-tokens 0 --log none"
SIZES = (
    "--model.hidden-size 16 --model.num-hidden-layers 2 --model.num-attention-heads 2 --model.num-key-value-heads 1"
    " --model.head-dim 8 --model.moe-intermediate-size 8 --model.num-experts 4 --model.num-experts-per-tok 2"
    " --final-eval-bytes 500"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log\n" * 60)
    return path


def train(text: Path, out: Path, *more: str) -> None:
    assert main(["train", "--data", str(text), "--out", str(out), *WORDS.split(), *SIZES.split(), *more]) == 0


def test_a_router_is_that_of_the_finished_run_and_all_else_is_the_seeds_own(tmp_path: Path) -> None:
    donor = init_state(MODEL, torch.Generator().manual_seed(7)).params
    save_pretrained(donor, MODEL, tmp_path / "donor")
    config = RunConfig(model=MODEL, seed=1, router_init=str(tmp_path / "donor"))
    state = with_router(first_state(config), config, [])
    own = init_state(MODEL, torch.Generator().manual_seed(1)).params
    assert_same_bits(partition(state.params)[0], partition(own)[0])
    assert_same_bits(partition(state.params)[1], partition(donor)[1])
    assert not torch.equal(own["layers"]["moe"]["router"], donor["layers"]["moe"]["router"]), "twin"


def test_a_router_of_other_sizes_is_refused_by_the_key(tmp_path: Path) -> None:
    other = replace(MODEL, num_experts=8)
    save_pretrained(init_state(other, torch.Generator()).params, other, tmp_path / "donor")
    config = RunConfig(model=MODEL, router_init=str(tmp_path / "donor"))
    with pytest.raises(UserError, match=r"router_init: expected layers\.moe\.router of shape \(2, 16, 4\)"):
        with_router(first_state(config), config, [])
    config = replace(config, router_init=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="router_init: expected the folder of a run or of a model"):
        with_router(first_state(config), config, [])


def test_a_run_with_the_fixed_router_of_another_run_keeps_it(tmp_path: Path, text: Path) -> None:
    train(text, tmp_path / "donor")
    train(text, tmp_path / "run", "--seed", "5", "--router-init", str(tmp_path / "donor"), "--hyper.router-lr", "0")
    donor, run = (flatten(open_run(tmp_path / name).params) for name in ("donor", "run"))
    assert_same_bits(run["layers.moe.router"], donor["layers.moe.router"])
    assert not torch.equal(run["layers.moe.w2"], donor["layers.moe.w2"])


def test_a_run_fills_its_table_from_the_tokens_of_its_text_and_goes_on_with_it(tmp_path: Path, text: Path) -> None:
    routing = "--model.routing", "hash", "--model.hash-key", "table"
    train(text, tmp_path / "run", *routing)
    params = open_run(tmp_path / "run").params
    corpus = open_corpus(str(text), sequence_length=16)
    counts = token_counts(corpus.train, 257)
    assert counts.tolist() == np.bincount(corpus.train.tokens, minlength=257).tolist()
    assert_same_bits(params["layers"]["moe"]["token_table"], balanced_table(counts, TABLE))
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["generate", str(tmp_path / "run"), "--prompt", "the", "--tokens", "4"]) == 0


def test_a_table_of_a_folder_stays_and_one_of_another_routing_is_made(tmp_path: Path) -> None:
    table = init_state(TABLE, torch.Generator().manual_seed(3)).params
    table["layers"]["moe"]["token_table"] += 0.25
    save_pretrained(table, TABLE, tmp_path / "table")
    config = RunConfig(model=TABLE, init=str(tmp_path / "table"))
    assert_same_bits(with_router(first_state(config), config, []).params, table)
    plain = replace(config, model=MODEL)
    assert "token_table" not in first_state(plain).params["layers"]["moe"]
    stable = first_state(replace(config, model=replace(MODEL, routing="stable"))).params["layers"]["moe"]
    assert_same_bits(stable["table_on"], torch.zeros(2, 1))


def test_a_dynamic_k_has_no_balanced_table(tmp_path: Path, text: Path) -> None:
    config = RunConfig(model=replace(TABLE, num_experts_per_tok=-1), hyper=HyperParams())
    corpus = open_corpus(str(text), sequence_length=16)
    with pytest.raises(UserError, match=r"model\.num_experts_per_tok: expected a fixed K"):
        with_router(first_state(config), config, [corpus.train])
