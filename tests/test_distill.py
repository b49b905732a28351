"""Distillation: the teacher's part of the main loss, and what surprise becomes under it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.func import vmap

from tests.helpers import assert_close, assert_same_bits, spread_params, tiny_batch, tiny_config
from tiny_onn_func import forward
from tiny_onn_func.experts import Rows, apply_w2
from tiny_onn_func.tree import flatten, unflatten
from training import HyperParams, hyper_step, init_state
from training.batch import IGNORE_INDEX
from training.checkpoint import latest_checkpoint, load_checkpoint
from training.cli import main
from training.hyper_step import main_gradients
from training.objectives import distillation
from training.recorder import read_history

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
    (fast, _), seen = main_gradients(params, BATCH, MIXED, CONFIG, STEP, teacher_logits=teacher_logits())
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
            found = seen.per_token_surprise[layer, rows.token[row], rows.expert[row]]
            assert float(found) == pytest.approx(float(hidden[row].norm() * grad[row].norm()), rel=1e-10)


def test_without_weight_or_teacher_the_step_is_bitwise_the_plain_one() -> None:
    state = init_state(CONFIG, torch.Generator().manual_seed(0))
    plain = hyper_step(state, BATCH, HyperParams(), CONFIG)
    unheard = hyper_step(state, BATCH, HyperParams(), CONFIG, teacher_logits=teacher_logits().float())
    untaught = hyper_step(state, BATCH, MIXED, CONFIG)
    for other, metrics in (unheard, untaught):
        assert_same_bits(other.params, plain[0].params)
        assert float(metrics.distill_loss) == 0


def test_a_student_that_is_its_teacher_learns_nothing_from_it() -> None:
    params = spread_params(CONFIG, 1)
    own, _ = forward(params, BATCH.input_ids, CONFIG, attention_mask=BATCH.attention_mask)
    only = HyperParams(distill_alpha=1.0)
    (fast, _), seen = main_gradients(params, BATCH, only, CONFIG, STEP, teacher_logits=own)
    assert max(float(grad.abs().max()) for grad in flatten(fast).values()) < 1e-12
    assert float(seen.distill_sum) == pytest.approx(0, abs=1e-12)
    assert float(seen.lm.loss_sum) > 1, "the metric stays the cross entropy"


def test_positions_without_a_target_teach_nothing() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, IGNORE_INDEX, 2, IGNORE_INDEX]])
    teacher = torch.randn(1, 4, 5)
    other = teacher.clone()
    other[:, 1::2] += 9
    assert distillation(logits, teacher, labels, 1.0) == distillation(logits, other, labels, 1.0)


def test_runs_with_different_weights_of_the_teacher_map() -> None:
    state, logits = init_state(CONFIG, torch.Generator().manual_seed(0)), teacher_logits().float()
    alphas = torch.tensor([0.0, 0.5, 1.0])

    def one(alpha: Tensor | float):
        return hyper_step(state, BATCH, MIXED._replace(distill_alpha=alpha), CONFIG, teacher_logits=logits)

    mapped, _ = vmap(one)(alphas)
    for index, alpha in enumerate(alphas):
        for name, leaf in flatten(one(alpha)[0].params).items():
            assert_close(flatten(mapped.params)[name][index], leaf, 2e-4, name)


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


def taught(text: Path, teacher: Path, out: Path, *more: str) -> int:
    flags = [f"--data={text}", f"--out={out}", f"--teacher={teacher}", "--hyper.distill-alpha=0.5", "--steps=3"]
    return main(["train", *flags, *SMALL, *more])


def test_a_run_learns_from_a_folder_and_cached_logits_change_no_bit(text: Path, teacher: Path, tmp_path: Path) -> None:
    assert taught(text, teacher, tmp_path / "fly") == 0
    for out in ("first", "second"):
        assert taught(text, teacher, tmp_path / out, "--teacher-cache=true") == 0
    files = [*(tmp_path / "cache" / "teacher").rglob("*")]
    assert sum(file.suffix == ".safetensors" for file in files) == 3, "one a step, made once"
    assert all(file.suffix != ".tmp" for file in files)
    states = [load_checkpoint(latest_checkpoint(tmp_path / out)) for out in ("fly", "first", "second")]
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])
    assert all(record["distill_loss"] > 0 for record in read_history(tmp_path / "fly"))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("nothing there", "teacher: expected a folder with a config.json"),
        ("a pickle", "teacher: expected .safetensors in"),
        ("another vocabulary", "model.vocab_size: expected 257, as the teacher's, got 300"),
        ("broken", "teacher: expected a causal language model in"),
        ("no weight", "hyper.distill-alpha: expected more than 0 with a teacher"),
        ("packed", "pack: expected False with a teacher"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_a_line_and_nothing_is_written(
    case: str, told: str, text: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, more = tmp_path / "folder", []
    if case != "nothing there":
        folder.mkdir()
        (folder / "config.json").write_bytes((teacher / "config.json").read_bytes())
    if case == "a pickle":
        torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    if case in ("another vocabulary", "no weight", "packed"):
        (folder / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
        more = {"no weight": ["--hyper.distill-alpha=0"], "packed": ["--pack=true"]}.get(
            case, ["--model.vocab-size=300"]
        )
    if case == "broken":
        (folder / "model.safetensors").write_bytes(b"\0" * 40)
    assert taught(text, folder, tmp_path / "out", *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1]
    assert not (tmp_path / "out").exists()
