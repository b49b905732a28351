"""Distillation: the teacher's part of the main loss, and what surprise becomes under it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.func import vmap

from tests.helpers import assert_close, assert_same_bits, spread_params, tiny_batch, tiny_config
from tiny_onn_func import forward, save_pretrained
from tiny_onn_func.experts import Rows, apply_w2
from tiny_onn_func.tree import flatten, partition, unflatten
from training import HyperParams, hyper_step, init_state
from training.cli import main
from training.commands.export import byte_tokenizer_files
from training.data.batches import batch_at
from training.data.corpus import open_corpus
from training.data.tokenizer import BYTES
from training.errors import UserError
from training.run.config import RunConfig, hyper_params
from training.run.initial_state import first_state
from training.run.teacher import open_teacher
from training.step.batch import IGNORE_INDEX
from training.step.losses import distillation
from training.step.main_pass import main_gradients
from training.storage.checkpoint import latest_checkpoint, load_checkpoint
from training.storage.recorder import read_history
from training.study.config import StudyConfig, expand
from training.study.file import parse_study
from training.study.runner import run_study

CONFIG = tiny_config(num_experts_per_tok=2)
BATCH = tiny_batch(CONFIG, batch=3, seq=6, left=(0, 2, 0), right=(0, 1, 3), unlabelled=0.3)
MIXED = HyperParams(distill_alpha=0.3, distill_temperature=2.0)
STEP = torch.zeros((), dtype=torch.int64)


def teacher_logits() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return 3 * torch.randn(3, 6, CONFIG.vocab_size, generator=generator, dtype=torch.float64)


def mixture(logits: Tensor) -> Tensor:
    """The loss by torch's own functions."""
    kept = BATCH.labels != IGNORE_INDEX
    hard = F.cross_entropy(logits[kept], BATCH.labels[kept], reduction="sum")
    soft = F.kl_div(
        (logits[kept] / 2).log_softmax(-1), (teacher_logits()[kept] / 2).softmax(-1), reduction="sum"
    )  # fmt: skip
    return 0.7 * hard + 0.3 * 4 * soft


def test_gradients_are_those_of_the_mixture_and_surprise_is_its_probe_gradient() -> None:
    params = spread_params(CONFIG, 1)
    (fast, _), result = main_gradients(*partition(params), BATCH, MIXED, CONFIG, STEP, teacher_logits=teacher_logits())
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in flatten(params).items()}
    probes: list[tuple[Tensor, Tensor, Rows]] = []

    def probed(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        y = apply_w2(layer, hidden, w2, rows)
        probes.append((torch.zeros_like(y).requires_grad_(), hidden.detach(), rows))
        return y + probes[-1][0]

    logits, _ = forward(
        unflatten(leaves), BATCH.input_ids, CONFIG, attention_mask=BATCH.attention_mask, apply_w2=probed
    )
    names = [*flatten(fast)]
    wanted = torch.autograd.grad(mixture(logits), [*(leaves[n] for n in names), *(probe for probe, _, _ in probes)])
    for name, grad in zip(names, wanted, strict=False):
        assert_close(flatten(fast)[name], grad, 1e-10, name)
    for layer, (grad, (_, hidden, rows)) in enumerate(zip(wanted[len(names) :], probes, strict=True)):
        for row in range(int(rows.offsets[-1])):
            surprise = result.per_token_surprise[layer, rows.token[row], rows.expert[row]]
            assert float(surprise) == pytest.approx(float(hidden[row].norm() * grad[row].norm()), rel=1e-10)


def test_without_weight_the_step_is_bitwise_the_plain_one() -> None:
    state = init_state(CONFIG, torch.Generator().manual_seed(0))
    plain = hyper_step(state, BATCH, HyperParams(), CONFIG)
    other, metrics = hyper_step(state, BATCH, HyperParams(), CONFIG, teacher_logits=teacher_logits().float())
    assert_same_bits(other.params, plain[0].params)
    assert float(metrics.distill_loss) == 0


def test_a_student_that_is_its_teacher_learns_nothing_from_it() -> None:
    params = spread_params(CONFIG, 1)
    own, _ = forward(params, BATCH.input_ids, CONFIG, attention_mask=BATCH.attention_mask)
    only = HyperParams(distill_alpha=1.0)
    (fast, _), result = main_gradients(*partition(params), BATCH, only, CONFIG, STEP, teacher_logits=own)
    assert max(float(grad.abs().max()) for grad in flatten(fast).values()) < 1e-12
    assert float(result.distill_sum) == pytest.approx(0, abs=1e-12)
    assert float(result.lm.loss_sum) > 1, "the metric stays the cross entropy"


def test_positions_without_a_target_teach_nothing() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, IGNORE_INDEX, 2, IGNORE_INDEX]])
    teacher = torch.randn(1, 4, 5)
    other = teacher.clone()
    other[:, 1::2] += 9
    assert distillation(logits, teacher, labels, 1.0) == distillation(logits, other, labels, 1.0)


def test_runs_with_different_weights_of_the_teacher_map() -> None:
    state, logits = init_state(CONFIG, torch.Generator().manual_seed(0)), teacher_logits().float()
    alphas = torch.tensor([0.0, 0.5, 1.0])

    def step(alpha: Tensor | float):
        return hyper_step(state, BATCH, MIXED._replace(distill_alpha=alpha), CONFIG, teacher_logits=logits)

    mapped, _ = vmap(step)(alphas)
    for index, alpha in enumerate(alphas):
        for name, leaf in flatten(step(alpha)[0].params).items():
            assert_close(flatten(mapped.params)[name][index], leaf, 2e-4, name)


def test_what_the_teacher_rules_out_adds_nothing_and_moves_finitely() -> None:
    teacher = torch.tensor([[[1.0, -torch.inf, 2.0]]])
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    kl = distillation(logits, teacher, torch.tensor([[0]]), 1.0)
    p = torch.tensor([1.0, 2.0]).softmax(-1)
    assert float(kl.detach()) == pytest.approx(float((p * (p.log() + torch.tensor(3.0).log())).sum()))
    (grad,) = torch.autograd.grad(kl, logits)
    assert_close(grad, torch.full((1, 1, 3), 1 / 3) - teacher.softmax(-1), 1e-6)


# The folder -----------------------------------------------------------------------------------------------------------

LLAMA = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=257)


def peer(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        ends = dict(bos_token_id=256, eos_token_id=256)
        config: Any = transformers.GPT2Config(
            vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=32, **ends, **changes
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=32, **changes)
    return transformers.LlamaForCausalLM(config).eval()


def run_config(folder: Path, **changes: Any) -> RunConfig:
    base = dict(hyper=HyperParams(distill_alpha=0.5), model=tiny_config(vocab_size=257), sequence_length=8, steps=2)
    return RunConfig(teacher=str(folder), **base | changes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_causal_language_model_teaches_its_own_logits(kind: str, tmp_path: Path) -> None:
    model, batch = peer(kind), tiny_batch(tiny_config(vocab_size=257), 2, 8)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = open_teacher(run_config(tmp_path), BYTES)
    assert teacher is not None
    with torch.no_grad():
        wanted = model.float()(batch.input_ids).logits
    assert_close(teacher(batch), wanted, 1e-5)
    assert (teacher(batch).dtype, teacher(batch).requires_grad) == (torch.float32, False)


def test_kept_logits_that_are_broken_are_asked_for_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    peer("llama").save_pretrained(tmp_path / "teacher")
    batch = tiny_batch(tiny_config(vocab_size=257), 2, 8)
    teacher = open_teacher(run_config(tmp_path / "teacher", teacher_cache=True), BYTES)
    assert teacher is not None
    wanted = teacher(batch)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = kept.read_bytes()
    for broken in (b"", b"\0" * 9, whole[:-5]):
        kept.write_bytes(broken)
        assert_same_bits(teacher(batch), wanted)
        assert kept.read_bytes() == whole


def test_logits_that_the_disk_cannot_hold_are_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    peer("llama").save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=f"^teacher_cache: expected room for {4 * 10**12 * 12 * 8 * 257:,} bytes"):
        open_teacher(run_config(tmp_path / "teacher", teacher_cache=True, steps=10**12, batch_size=12), BYTES)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation"])
def test_no_code_of_a_teacher_is_run(key: str, tmp_path: Path) -> None:
    peer("llama").save_pretrained(tmp_path / "teacher")
    path, marker = tmp_path / "teacher" / "config.json", tmp_path / "ran"
    (tmp_path / "teacher" / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: ...\nclass Config: ...\n")
    own = {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}
    values = json.loads(path.read_text()) | {key: own if key == "auto_map" else "somebody/kernel:own"}
    path.write_text(json.dumps(values))
    assert open_teacher(run_config(tmp_path / "teacher"), BYTES) is not None
    path.write_text(json.dumps(values | {"model_type": "own"}))
    with pytest.raises(UserError, match=r"^teacher: expected a causal language model in .*\Z"):
        open_teacher(run_config(tmp_path / "teacher"), BYTES)
    assert not marker.exists()


# The command ----------------------------------------------------------------------------------------------------------

SMALL = [
    "--batch-size=2",
    "--sequence-length=16",
    "--eval-every=0",
    "--eval-bytes=50",
    "--final-eval-bytes=50",
    "--picture-every=0",
    "--sample-tokens=0",
    "--model.hidden-size=16",
    "--model.num-hidden-layers=1",
    "--model.num-attention-heads=2",
    "--model.num-key-value-heads=1",
    "--model.head-dim=8",
    "--model.moe-intermediate-size=8",
    "--model.num-experts=4",
    "--model.num-experts-per-tok=2",
    "--threads=1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to teach is to learn twice over; " * 40)
    return tmp_path / "text.txt"


def other_tokenizer() -> str:
    """The bytes, two of them with each other's ids."""
    values = json.loads(byte_tokenizer_files(64)["tokenizer.json"])
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return json.dumps(values)


def taught(text: Path, teacher: Path, out: Path, *more: str) -> int:
    flags = [f"--data={text}", f"--out={out}", f"--teacher={teacher}", "--hyper.distill-alpha=0.5", "--steps=3"]
    return main(["train", *flags, *SMALL, *more])


def test_a_run_learns_from_a_folder_and_neither_kept_logits_nor_a_stop_change_a_bit(
    text: Path, teacher: Path, tmp_path: Path
) -> None:
    assert taught(text, teacher, tmp_path / "fly") == 0
    assert taught(text, teacher, tmp_path / "kept", "--teacher-cache=true", "--checkpoint-every=2") == 0
    states = [load_checkpoint(latest_checkpoint(tmp_path / out)) for out in ("fly", "kept")]
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache" / "teacher").rglob("*") if f.is_file()}
    assert [file.suffix for file in files] == [".safetensors"] * 3, "one a step"
    shutil.rmtree(latest_checkpoint(tmp_path / "kept"))  # as if it had been stopped after step 2
    assert main(["train", f"--out={tmp_path / 'kept'}", "--resume"]) == 0
    assert all(file.stat().st_mtime_ns == mtime for file, mtime in files.items()), "made once"
    for state in (states[1], load_checkpoint(latest_checkpoint(tmp_path / "kept"))):
        assert_same_bits(state, states[0])
    assert all(record["distill_loss"] > 0 for record in read_history(tmp_path / "fly"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing there", "teacher: expected a folder with a config.json"),
        ("a pickle", "teacher: expected .safetensors in"),
        ("another vocabulary", "model.vocab_size: expected 257, as the teacher's, got 300"),
        ("another tokenizer", "tokenizer: expected the one of teacher, in"),
        ("broken", "teacher: expected a causal language model in"),
        ("headless", "teacher: expected all weights of the model in"),
        ("short", "sequence_length: expected at most 64, what the teacher can read, got 65"),
        ("no weight", "hyper.distill-alpha: expected more than 0 with a teacher"),
        ("packed", "pack: expected False with a teacher"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_a_line_and_nothing_is_written(
    case: str, message: str, text: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, more = tmp_path / "folder", []
    if case != "nothing there":
        folder.mkdir()
        (folder / "config.json").write_bytes((teacher / "config.json").read_bytes())
    if case == "a pickle":
        torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    flags = {
        "another vocabulary": ["--model.vocab-size=300"], "no weight": ["--hyper.distill-alpha=0"],
        "packed": ["--pack=true"], "short": ["--sequence-length=65"], "another tokenizer": [],
    }  # fmt: skip
    if case in flags:
        (folder / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
        more = flags[case]
    if case == "another tokenizer":
        (folder / "tokenizer.json").write_text(other_tokenizer())
    if case == "broken":
        (folder / "model.safetensors").write_bytes(b"\0" * 40)
    if case == "headless":
        peer("llama").model.save_pretrained(folder)
        capsys.readouterr()
    assert taught(text, folder, tmp_path / "out", *more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_study_maps_runs_that_start_from_a_folder_and_hear_a_teacher(
    text: Path, teacher: Path, tmp_path: Path
) -> None:
    model = tiny_config(vocab_size=257, num_experts_per_tok=2)
    save_pretrained(spread_params(model, 1, dtype=torch.float32), model, tmp_path / "weights")
    base = {
        "data": str(text), "steps": 2, "batch_size": 2, "sequence_length": 16, "eval_every": 0, "final_eval_bytes": 50,
        "init": str(tmp_path / "weights"), "teacher": str(teacher), "hyper": {"distill_alpha": 1.0}, "threads": 1,
    }  # fmt: skip
    values = {"margin": 0.1, "base": base, "axes": {"hyper.distill_alpha": [0.5, 1.0]}, "seeds": [0, 1]}
    study = parse_study({**values, "analysis_tokens": 0}, name="taught")
    assert study.base.model == model, "sizes follow init"
    run_study(study, tmp_path / "study")
    assert len(json.loads((tmp_path / "study" / "checkpoints" / "plan.json").read_text())) == 1, "one program"
    hears = open_teacher(study.base, BYTES)
    assert hears is not None
    for run in expand(study):
        config = run.config
        corpus = open_corpus(str(text), holdout=config.holdout, split=config.split, sequence_length=16).train
        state = first_state(config)
        for step in range(2):
            batch = batch_at(corpus, config.seed, step, 2, 16)
            state, _ = hyper_step(state, batch, hyper_params(config), model, teacher_logits=hears(batch))
        checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "study" / "runs" / run.id))
        for name, leaf in flatten(state.params).items():
            assert_close(flatten(checkpoint["params"])[name], leaf, 2e-4, name)


def test_the_weights_that_a_study_starts_from_are_those_of_its_base() -> None:
    with pytest.raises(UserError, match=r"^axes.init: expected .*, got init; set it in base"):
        StudyConfig("starts", margin=0.1, axes={"init": ["a", "b"]}, seeds=(0,))
