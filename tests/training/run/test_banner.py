"""The banner of a run says what is about to happen, with the numbers of the run itself."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.training.run.test_engine import SMALL, TEXT
from training.cli import main
from training.run.banner import BannerFacts, banner, device_text
from training.run.config import Precision
from training.run.device import Placement

FACTS = BannerFacts(
    version="1.2.3", torch_version="2.13.0", data="stdlib", train_bytes=12345, held_out_bytes=678, tokenizer="bytes",
    vocab_size=257, device="cpu, float32", processes=1, threads=2, kernels=True, parameters=1812032,
    active_parameters=632384, active_flops=1.333e6, at_most=False, steps=2800, first_step=0, batch_size=12,
    sequence_length=64, parts=1, out="runs/first",
)  # fmt: skip
TEXT_OF_FACTS = """\
tiny-onn 1.2.3, torch 2.13.0
data        stdlib: 12,345 bytes to train on, 678 held out
tokenizer   bytes, 257 tokens
device      cpu, float32
threads     2; C kernels compiled
parameters  1,812,032, 632,384 active in a token
FLOPs       1.33 M a token forward, about three times that in a training step
steps       2,800 of 12 x 64 tokens
run folder  runs/first"""


def test_the_banner_is_aligned_lines_of_the_facts() -> None:
    assert banner(FACTS) == TEXT_OF_FACTS


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kernels": False}, "threads     2; no C kernels: PyTorch's operations, several times slower"),
        ({"processes": 4}, "threads     4 processes of 2; C kernels compiled"),
        ({"at_most": True}, "parameters  1,812,032, at most 632,384 active in a token"),
        ({"parts": 4}, "steps       2,800 of 12 x 64 tokens in 4 parts"),
        ({"first_step": 1200}, "steps       2,800 of 12 x 64 tokens from step 1,200 on"),
        ({"active_flops": 2.5e10}, "FLOPs       25 G a token forward, about three times that in a training step"),
        ({"active_flops": 999.7}, "FLOPs       1 k a token forward, about three times that in a training step"),
        ({"active_flops": 4e15}, "FLOPs       4e+03 T a token forward, about three times that in a training step"),
    ],
)
def test_a_line_says_what_is_unusual(changes: dict, line: str) -> None:
    assert line in banner(FACTS._replace(**changes)).splitlines()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_device_is_named_with_its_precision_and_the_reasons(precision: Precision) -> None:
    placement = Placement(torch.device("cpu"), precision, "no accelerator", "as asked")
    assert device_text(placement) == f"cpu (no accelerator), {precision} (as asked)"


def test_a_run_begins_with_its_banner_unless_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT, encoding="utf-8")
    words = ["train", "--data", str(text), "--out", str(out), "--steps=3", *SMALL]
    assert main(words) == 0
    said = capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    sides = re.search(r"^data        .*: ([\d,]+) bytes to train on, ([\d,]+) held out$", said, re.MULTILINE)
    assert sides is not None
    assert sum(int(side.replace(",", "")) for side in sides.groups()) == len(TEXT)
    assert f"parameters  {summary['parameters']:,}, {summary['active_parameters']:,} active in a token\n" in said
    assert f"run folder  {out}\n" in said
    assert "\r" not in said
    assert main([*words[:4], str(tmp_path / "quiet"), *words[5:], "-q"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "this model" in printed.out
