"""Runs that start from a folder of weights, and a backbone that stays as it is."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers import assert_same_bits, spread_params, tiny_batch, tiny_config
from tiny_onn_func import save_pretrained
from tiny_onn_func.tree import flatten, tree_map
from training import HyperParams, hyper_step, init_state
from training.cli import main
from training.commands.export import byte_tokenizer_files
from training.data.tokenizer import BYTES
from training.run.config import RunConfig
from training.run.initial_state import first_state
from training.run.settings import load_settings
from training.step.optim import is_backbone
from training.storage.recorder import read_history

RUN = [
    "--batch-size=2",
    "--sequence-length=16",
    "--eval-every=0",
    "--eval-bytes=50",
    "--final-eval-bytes=50",
    "--picture-every=0",
    "--sample-tokens=0",
    "--threads=1",
    "--steps=1",
]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("begin where another ended; " * 40)
    return tmp_path / "text.txt"


def test_surgery_then_training_starts_at_the_loss_of_the_dense_model(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    dense = transformers.Qwen3ForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense")
    assert main(["surgery", str(tmp_path / "dense"), "--out", str(tmp_path / "cut"), "--num-experts", "4"]) == 0
    flags = [f"--data={text}", f"--out={tmp_path / 'run'}", f"--init={tmp_path / 'cut'}"]
    assert main(["train", *flags, *RUN]) == 0
    run = load_settings(str(tmp_path / "run" / "config.yaml"))
    assert (run.model.hidden_size, run.model.num_experts, run.model.num_experts_per_tok) == (16, 4, 4)
    from training.data.batches import batch_at
    from training.data.corpus import open_corpus

    corpus = open_corpus(run.data, holdout=run.holdout, split=run.split, sequence_length=run.sequence_length)
    batch = batch_at(corpus.train, run.seed, 0, run.batch_size, run.sequence_length)
    with torch.no_grad():
        logits = dense(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert read_history(tmp_path / "run")[0]["main_loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_a_run_with_init_goes_on_and_is_scored_when_its_folder_of_weights_is_gone(text: Path, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=257, num_experts_per_tok=2)
    save_pretrained(spread_params(config, 1, dtype=torch.float32), config, tmp_path / "weights")
    flags = [f"--data={text}", f"--out={tmp_path / 'run'}", f"--init={tmp_path / 'weights'}"]
    assert main(["train", *flags, *RUN]) == 0
    (tmp_path / "weights").rename(tmp_path / "elsewhere")
    assert main(["evaluate", str(tmp_path / "run"), "--bytes=50"]) == 0
    assert main(["train", f"--out={tmp_path / 'run'}", "--resume", "--steps=2"]) == 0


def test_the_first_state_is_the_folder_in_float32_and_k_is_free(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=257, num_experts_per_tok=2)
    params = spread_params(config, 1, dtype=torch.bfloat16)
    save_pretrained(params, config, tmp_path / "weights")
    model = tiny_config(vocab_size=257, num_experts_per_tok=3)
    state = first_state(RunConfig(init=str(tmp_path / "weights"), model=model))
    assert_same_bits(state.params, tree_map(lambda leaf: leaf.float(), params))
    assert int(state.step) == 0


def test_the_tokens_follow_the_folder_and_others_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = tiny_config(vocab_size=257, num_experts_per_tok=2), tmp_path / "weights"
    save_pretrained(spread_params(config, 1, dtype=torch.float32), config, weights)
    values = json.loads(byte_tokenizer_files(64)["tokenizer.json"])
    vocabulary = values["model"]["vocab"]
    (weights / "tokenizer.json").write_text(json.dumps(values))
    assert load_settings(overrides={"init": str(weights)}).tokenizer == str(weights)
    flags = [f"--data={text}", f"--out={tmp_path / 'run'}", f"--init={weights}", "--tokenizer=bytes", *RUN]
    first_state(load_settings(overrides={"init": str(weights), "tokenizer": "bytes"}), BYTES)  # which are the same
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (weights / "tokenizer.json").write_text(json.dumps(values))
    assert main(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tokenizer: expected the one of init, in" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.hidden-size=64", "model.hidden_size: expected 8, as in"),
        ("--config=sizes.yaml", "model.hidden_size: expected 8, as in"),
        ("--init=nowhere", "init: expected a folder with a model, got nowhere"),
    ],
)
def test_what_contradicts_the_folder_is_refused_in_a_line(
    flag: str, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(vocab_size=257, num_experts_per_tok=2)
    save_pretrained(spread_params(config, 1, dtype=torch.float32), config, tmp_path / "weights")
    (tmp_path / "sizes.yaml").write_text("model: {hidden_size: 64, num_experts_per_tok: 3}")
    flag = flag.replace("sizes.yaml", str(tmp_path / "sizes.yaml"))
    init = [] if flag.startswith("--init") else [f"--init={tmp_path / 'weights'}"]
    assert main(["train", f"--data={text}", f"--out={tmp_path / 'run'}", *init, flag, *RUN]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_frozen_backbone_keeps_its_bits_while_experts_and_router_learn(mapped: bool) -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch = tiny_batch(config, 4, 9)
    start = state = init_state(config, torch.Generator().manual_seed(0))
    scale = torch.tensor(0.0) if mapped else 0.0
    for _ in range(3):
        state, _ = hyper_step(state, batch, HyperParams(backbone_lr_scale=scale), config)
    before, after = flatten(start.params), flatten(state.params)
    for name, leaf in before.items():
        if is_backbone(name):
            assert torch.equal(after[name], leaf), name
        elif not name.endswith("router_bias"):
            assert (after[name] != leaf).any(), name
    assert sum(map(is_backbone, before)) == len(before) - 5, "w1, w2, w3, router and its bias are none"


def test_the_share_of_the_backbone_multiplies_its_rate_and_no_other() -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch, state = tiny_batch(config, 4, 9), init_state(config, torch.Generator().manual_seed(0))
    steps = [
        flatten(hyper_step(state, batch, hyper, config)[0].params)
        for hyper in (HyperParams(), HyperParams(backbone_lr_scale=0.5), HyperParams(lr=1.5e-3))
    ]
    for name, leaf in steps[1].items():
        torch.testing.assert_close(leaf, steps[2 if is_backbone(name) else 0][name])
