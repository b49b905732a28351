"""Mixtures: which spec is one, how often each source is drawn, what is held out, and what stops or forbids a run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import ROOT
from training.cli import main
from training.data.batches import batch_at
from training.data.corpus import Corpus, Splits, fingerprint, open_corpus, whole
from training.data.mixture import BLOCK, Part, Stream, Weighted, draw_parts, parse_mixture, taking_turns
from training.data.tokenizer import BOUNDARY
from training.errors import UserError
from training.step.batch import IGNORE_INDEX
from training.storage.plain_yaml import write_yaml

SMALL = [
    "--batch-size=4", "--sequence-length=16", "--final-eval-bytes=60", "--sample-tokens=0", "--eval-every=2",
    "--model.hidden-size=16", "--model.num-hidden-layers=1", "--model.num-attention-heads=2",
    "--model.num-key-value-heads=1", "--model.head-dim=8", "--model.moe-intermediate-size=8", "--model.num-experts=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of `a`, lines of `b` and a chat, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a" * 30_000)
    Path("b.jsonl").write_text("".join(json.dumps({"text": "b" * (20 + i % 7) + f" {i}"}) + "\n" for i in range(600)))
    turns = [{"role": "user", "content": "c" * 50}, {"role": "assistant", "content": "dddd"}]
    Path("c.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(99)))
    return tmp_path


def opened(spec: str, **how: object) -> Splits:
    return open_corpus(spec, sequence_length=16, **how)


# Specs ----------------------------------------------------------------------------------------------------------------


def test_a_mixture_is_sources_with_weights(sources: Path) -> None:
    assert parse_mixture("a.txt:0.7,b.jsonl:3e-1") == (("a.txt", 0.7), ("b.jsonl", 0.3))
    assert parse_mixture("stdlib:email/*.py:1,hf:owner/name:train:2") == (
        ("stdlib:email/*.py", 1),
        ("hf:owner/name:train", 2),
    )
    assert parse_mixture("a.txt:0,b.jsonl:2") == (("b.jsonl", 2),)
    assert parse_mixture("x" * 999 + ":1,y:1")[0].weight == 1
    for single in ("a.txt", "stdlib", "stdlib:email/*.py", "hf:owner/name:train", "a.txt:0.5"):
        assert parse_mixture(single) == (Weighted(single, 1.0),)


def test_files_with_commas_and_colons_in_their_names_are_those_files(sources: Path) -> None:
    for name in ("x,y.txt", "x:0.5,y:0.5", "b:0.3", "hf:x", "p,q:1", "stdlib,x"):
        Path(name).write_text("z" * 999)
    assert parse_mixture("x,y.txt") == (("x,y.txt", 1),)
    assert parse_mixture("x:0.5,y:0.5") == (("x:0.5,y:0.5", 1),)
    assert parse_mixture("x,y.txt:1,a.txt:2,p,q:1:3") == (("x,y.txt", 1), ("a.txt", 2), ("p,q:1", 3))
    assert parse_mixture("b:0.3:0.5,a.txt:1") == (("b:0.3", 0.5), ("a.txt", 1))
    for name in ("x,y.txt", "x:0.5,y:0.5", "b:0.3", "hf:x", "./hf:x"):
        assert opened(name).train.num_bytes == 899


WRONG = [
    ("a.txt:-1,b.jsonl:2", "a weight of 0 or more, got 'a.txt:-1'"),
    ("a.txt:nan,b.jsonl:2", "got 'a.txt:nan'"),
    ("a.txt:inf,b.jsonl:2", "got 'a.txt:inf'"),
    ("a.txt:1,b.jsonl:-inf", "got 'b.jsonl:-inf'"),
    ("a.txt:much,b.jsonl:2", "got 'a.txt:much'"),
    ("a.txt,b.jsonl", "expected SOURCE:WEIGHT .*, got 'a.txt'; such as"),
    ("a.txt:0.5,b.jsonl", "got 'b.jsonl'"),
    ("a.txt:0.5,", "got ''"),
    (":0.5,:0.5", "got ':0.5'"),
    (",", "got ''"),
    ("a.txt:0,b.jsonl:0", "a finite sum above 0"),
    ("a.txt:1e308,b.jsonl:1e308", "a finite sum above 0"),
    ("a.txt:1,a.txt:2", "each source once"),
    ("a.txt:1,missing.txt:2", "missing.txt: expected stdlib, a file, .* got no such thing"),
    ("a.txt:1,empty.txt:2", "empty.txt: expected text, got an empty file"),
    ("a.txt:1,short.txt:2", "short.txt: expected at least 17 tokens"),
    ("a.txt:1,\0:2", "no such thing"),
    ("a.txt:1," + "x" * 300 + ":2", "File name too long"),
    ("a:1," * 20_000, "got no such thing|each source once|expected SOURCE:WEIGHT"),
]


@pytest.mark.parametrize(("spec", "match"), WRONG, ids=[spec[:30] for spec, _ in WRONG])
def test_a_wrong_mixture_is_refused_in_one_line(spec: str, match: str, sources: Path) -> None:
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("x" * 40)
    with pytest.raises(UserError, match=match) as caught:
        opened(spec)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("spec", ["a.txt:-1,b.jsonl:2", "a.txt:1,missing.txt:2"])
def test_a_wrong_mixture_ends_the_command_with_status_2_and_no_folder(
    spec: str, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"--data={spec}", "--out=run", "--steps=1", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("tiny-onn: ")
    assert not Path("run").exists()


# Batches --------------------------------------------------------------------------------------------------------------


def shares(corpus: Corpus, steps: int, letters: str = "ab", seed: int = 0) -> list[float]:
    rows = [row for step in range(steps) for row in batch_at(corpus, seed, step, 8, 16).input_ids[:, :8].tolist()]
    return [sum(ord(letter) in row for row in rows) / len(rows) for letter in letters]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (1, 9), (2e300, 1e300)])
def test_a_row_comes_from_a_source_with_the_probability_of_its_weight(
    weights: tuple[float, float], sources: Path
) -> None:
    first, second = weights
    train = opened(f"a.txt:{first},b.jsonl:{second}").train
    wanted = first / (first + second)
    a, b = shares(train, 250)
    assert a + b == 1.0  # no window reaches from one source into the other
    assert abs(a - wanted) < 4 * (wanted * (1 - wanted) / 2000) ** 0.5


def test_a_weight_of_zero_leaves_a_source_out(sources: Path) -> None:
    with_zero, alone = opened("a.txt:1,b.jsonl:0"), opened("a.txt")
    assert with_zero.train.parts == ()
    assert with_zero.folder == alone.folder


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), st.integers(0, 2**63 - 1))
def test_a_batch_of_a_mixture_depends_on_seed_and_step_alone(steps: list[int], seed: int) -> None:
    stream = np.arange(256, dtype=np.uint16)
    corpus = Corpus(stream, np.ones(256, np.uint8), 256, 255, 1)._replace(
        parts=(Part(0, 100, 0.3), Part(100, 256, 0.7))
    )
    first = {step: batch_at(corpus, seed, step, 5, 8) for step in steps}
    for step in reversed(steps):
        for before, again in zip(first[step], batch_at(corpus, seed, step, 5, 8), strict=True):
            assert torch.equal(before, again)
        ids, labels = first[step].input_ids, first[step].labels
        assert ((ids < 100) == (labels < 100)).all()  # inputs and labels of one part


def test_batches_of_a_single_source_have_the_bits_that_they_always_had(sources: Path) -> None:
    """Or every resumed run would go on with other batches."""
    corpus = Corpus(np.arange(256, dtype=np.uint16), np.ones(256, np.uint8), 256, 255, 1)
    assert batch_at(corpus, 7, 11, 4, 8).input_ids[:, 0].tolist() == KNOWN


KNOWN = [205, 233, 15, 140]


def test_draws_are_exact_for_weights_of_any_size() -> None:
    words = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert draw_parts([1.0, 1.0], words).tolist() == [0, 0, 1, 1]
    assert draw_parts([5e-324, 1e308], words).tolist() == [1, 1, 1, 1]
    assert draw_parts([1e308, 5e-324], words).tolist() == [0, 0, 0, 1]
    assert draw_parts([1.0, 2.0, 1.0], words).tolist() == [0, 1, 1, 2]


def test_only_assistant_turns_are_learned_in_a_mixture_with_chats(sources: Path) -> None:
    train = opened("a.txt:1,c.jsonl:1", split="tail").train
    labels = torch.cat([batch_at(train, 0, step, 8, 16).labels.flatten() for step in range(20)])
    assert set(labels.tolist()) <= {IGNORE_INDEX, BOUNDARY, *b"ad<|end>\n"}


# Sides ----------------------------------------------------------------------------------------------------------------


def test_the_sides_of_a_mixture_are_those_of_its_sources(sources: Path) -> None:
    mixed, parts = opened("a.txt:1,b.jsonl:3"), [opened("a.txt"), opened("b.jsonl")]
    assert mixed.train.tokens.tolist() == [token for part in parts for token in part.train.tokens.tolist()]
    for side in ("train", "held_out"):
        assert getattr(mixed, side).num_bytes == sum(getattr(part, side).num_bytes for part in parts)
    tokens = mixed.held_out.tokens
    for letter, part in zip("ab", parts, strict=True):
        assert (tokens == ord(letter)).sum() == (part.held_out.tokens == ord(letter)).sum()
    assert mixed.split == "document, tail"
    assert whole(mixed).num_bytes == mixed.train.num_bytes + mixed.held_out.num_bytes


STREAM = st.lists(st.integers(0, 3).map(lambda n: n or BOUNDARY), max_size=60).map(lambda tokens: [*tokens, BOUNDARY])


@given(st.lists(STREAM, min_size=2, max_size=3), st.lists(st.floats(0.1, 9), min_size=3, max_size=3))
def test_taking_turns_loses_no_token_and_keeps_the_order(streams: list[list[int]], weights: list[float]) -> None:
    marked = [np.array([i * 10 + t if t < 10 else t for t in tokens], np.uint16) for i, tokens in enumerate(streams)]
    flags = [np.ones(tokens.size, np.uint8) for tokens in marked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.mixture.BLOCK", 5)
        blocks = [*taking_turns([*map(Stream, marked, flags)], weights, BOUNDARY)]
    for i, tokens in enumerate(marked):
        ours = [t for block in blocks for t in block.tokens.tolist() if t != BOUNDARY and t // 10 == i]
        assert ours == [t for t in tokens.tolist() if t != BOUNDARY]
    learned = sum(int(block.targets.sum()) for block in blocks)
    assert learned == sum(map(len, streams))  # a boundary that closes a block within a document is not


@pytest.mark.parametrize("weight", [0.5, 0.8])
def test_every_beginning_of_the_held_out_side_has_the_shares_of_the_weights(weight: float) -> None:
    long = np.full(40 * BLOCK, 1, np.uint16)
    short = np.tile(np.array([2] * 99 + [BOUNDARY], np.uint16), BLOCK * 40 // 100)
    streams = [Stream(tokens, np.ones(tokens.size, np.uint8)) for tokens in (long, short)]
    tokens = np.concatenate([block.tokens for block in taking_turns(streams, [weight, 1 - weight], BOUNDARY)])
    for end in range(6 * BLOCK, 40 * BLOCK, BLOCK):
        share = (tokens[:end] == 1).sum() / end
        assert abs(share - weight) < 3 * BLOCK / end


def test_weights_are_a_part_of_what_a_resumed_run_must_share(sources: Path) -> None:
    prints = {fingerprint(opened(f"a.txt:{weight},b.jsonl:1")) for weight in (1, 2, 1)}
    assert len(prints) == 2


# Runs -----------------------------------------------------------------------------------------------------------------


def records(folder: str) -> list[Mapping[str, object]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_a_resumed_run_on_a_mixture_has_the_bits_of_one_that_never_stopped(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--data=a.txt:0.7,b.jsonl:0.3"
    assert main(["train", data, "--out=once", "--steps=4", "--checkpoint-every=2", *SMALL]) == 0
    shutil.copytree("once", "twice")
    shutil.rmtree("twice/checkpoints/step_000004")
    assert main(["train", "--out=twice", "--resume"]) == 0
    assert records("once") == records("twice")
    assert len(records("once")) == 4
    capsys.readouterr()
    shutil.rmtree("twice/checkpoints/step_000004")
    assert main(["train", "--out=twice", "--resume", "--data=a.txt:0.6,b.jsonl:0.4"]) == 2
    assert "another text" in capsys.readouterr().err
    assert main(["evaluate", "once", "--bytes=200"]) == 0
    assert main(["evaluate", "once", "--all", "--bytes=200"]) == 0


def test_two_processes_train_on_the_batches_of_one(sources: Path) -> None:
    data, how = "--data=a.txt:0.7,b.jsonl:0.3", ["--steps=3", *SMALL]
    assert main(["-q", "train", data, "--out=one", *how]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "training"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "train", data, "--out=two", *how], check=True, capture_output=True, env=env, timeout=400)
    one, two = ([record["main_loss"] for record in records(folder)] for folder in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    assert len(one) == 3


def test_a_study_trains_its_runs_on_a_mixture(sources: Path) -> None:
    base = {"data": "a.txt:0.7,b.jsonl:0.3", "steps": 2, "batch_size": 2, "sequence_length": 16, "final_eval_bytes": 60}
    base |= {"eval_every": 0, "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_experts": 4}}
    plan = {
        "question": "Is it read?", "margin": 0.02, "falsifier": "It is not.", "baseline": "plain", "seeds": [0, 1],
        "base": base, "arms": [{"name": "plain"}, {"name": "quick", "set": {"hyper.lr": 0.01}}],
    }  # fmt: skip
    write_yaml(plan, "study.yaml")
    assert main(["study", "study.yaml", "--out=study"]) == 0
    assert len([*Path("study", "runs").iterdir()]) == 4


def test_a_tokenizer_learns_from_all_sources_of_a_mixture(sources: Path) -> None:
    pytest.importorskip("tokenizers")
    assert main(["tokenizer", "train", "--data=a.txt:0.9,b.jsonl:0.1", "--vocab-size=262", "--out=bpe"]) == 0
    vocab = json.loads(Path("bpe/tokenizer.json").read_text())["model"]["vocab"]
    assert {"aa", "bb"} <= vocab.keys()
