"""Surgery keeps the function of a dense Qwen3 with all experts active, streams, and refuses in a line."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the network

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import ROOT, assert_close, assert_same_bits, seeded
from tests.tiny_onn_func.huggingface.test_pretrained import make_run
from tiny_onn_func import forward, load_pretrained
from tiny_onn_func.huggingface import folder
from tiny_onn_func.huggingface.config import read_config
from tiny_onn_func.huggingface.folder import read_headers
from tiny_onn_func.tree import tree_map
from training.cli import main
from training.commands import surgery
from training.commands.clusters import Seen, assign_evenly, calibrate, cluster_neurons, fit_router, read_calibration
from training.commands.export import byte_tokenizer_files
from training.commands.surgery import cut_into_experts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of their numbers
    transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

INNER = 24
IDS = torch.randint(257, (2, 16), generator=seeded(3))
TEXT = "the router sends each token to the expert that it surprises least.\n" * 40


def dense_model(tied: bool = True, **changes: Any) -> torch.nn.Module:
    """A tiny Qwen3 of theirs, every weight random, norms too."""
    sizes = dict(
        vocab_size=257, hidden_size=32, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied, eos_token_id=256, max_position_embeddings=99,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | changes)).eval()
    generator = seeded(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return model


def dense_logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def our_logits(folder: Path, top_k: int | None = None, ids: Tensor = IDS) -> Tensor:
    """In float32, whatever is on the disk."""
    params, config = load_pretrained(folder)
    config = config if top_k is None else replace(config, num_experts_per_tok=top_k)
    with torch.no_grad():
        return forward(tree_map(lambda leaf: leaf.float(), params), ids, config)[0]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return dense_model()


@pytest.fixture(scope="module")
def dense(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surgery") / "dense"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("surgery") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def byte_tokenizer() -> str:
    return byte_tokenizer_files(64)["tokenizer.json"].decode()


# The function ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [1, 3, 8, 24])
@pytest.mark.parametrize("split", ["contiguous", "clusters"])
def test_with_all_experts_active_the_logits_are_the_dense_models(
    split: str, num_experts: int, model: torch.nn.Module, dense: Path, text: Path, tmp_path: Path
) -> None:
    calibration = text if split == "clusters" else None
    cut_into_experts(dense, tmp_path / "out", num_experts=num_experts, split=split, calibration=calibration)
    assert load_pretrained(tmp_path / "out")[1].num_experts_per_tok == num_experts
    assert_close(our_logits(tmp_path / "out"), dense_logits(model), 1e-4, "logits")


@pytest.mark.parametrize("split", ["contiguous", "clusters"])
def test_neither_large_norms_nor_large_logits_let_the_routers_noise_be_felt(
    split: str, text: Path, tmp_path: Path
) -> None:
    """What a trained checkpoint has and a fresh one has not: norms far above 1, logits of several nats."""
    peer = dense_model(tied=False, num_hidden_layers=4)
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            weight.mul_(30 if "post_attention" in name else 5 if "lm_head" in name else 1)
    assert 4 < float(dense_logits(peer).std()) < 20
    peer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text(byte_tokenizer())
    calibration = text if split == "clusters" else None
    cut_into_experts(tmp_path / "dense", tmp_path / "out", num_experts=8, split=split, calibration=calibration)
    assert float((our_logits(tmp_path / "out") - dense_logits(peer)).abs().max()) < 1e-4  # not relative


@pytest.mark.parametrize(("how", "dtype", "tied"), [
    (dict(), torch.float32, False),
    (dict(), torch.bfloat16, True),
    (dict(max_shard_size="8KB"), torch.float32, True),
    (dict(max_shard_size="8KB"), torch.bfloat16, False),
])  # fmt: skip
def test_every_kind_of_checkpoint_keeps_its_function_and_its_dtype(
    how: dict[str, Any], dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    """E = 8 is a power of two: the factor in w2 is exact in bfloat16, too."""
    peer = dense_model(tied).to(dtype)
    peer.save_pretrained(tmp_path / "dense", **how)
    assert (len([*(tmp_path / "dense").glob("*.safetensors")]) > 1) == bool(how)
    cut_into_experts(tmp_path / "dense", tmp_path / "out", num_experts=8)
    params, _ = load_pretrained(tmp_path / "out")
    assert params["layers"]["moe"]["w2"].dtype == dtype
    assert_same_bits(params["embed_tokens"], peer.get_input_embeddings().weight)
    assert_same_bits(params["layers"]["self_attn"]["q_proj"][1].mT, peer.model.layers[1].self_attn.q_proj.weight)
    assert_close(our_logits(tmp_path / "out"), dense_logits(peer.float()), 1e-4, "logits")


def test_the_result_opens_in_transformers_and_brings_the_tokenizer(
    model: torch.nn.Module, dense: Path, tmp_path: Path
) -> None:
    cut_into_experts(dense, tmp_path / "out", num_experts=3)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(dense_logits(peer), dense_logits(model), 1e-4, "logits")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (peer.config.eos_token_id, peer.config.max_position_embeddings) == (256, 99)


def test_every_neuron_is_in_exactly_one_expert(model: torch.nn.Module, dense: Path, text: Path, tmp_path: Path) -> None:
    cut_into_experts(dense, tmp_path / "out", num_experts=8, split="clusters", calibration=text)
    moe, mlp = load_pretrained(tmp_path / "out")[0]["layers"]["moe"], model.model.layers[1].mlp
    cut = torch.cat((moe["w1"][1].mT, moe["w3"][1].mT, moe["w2"][1] / 8), dim=-1).flatten(0, 1)
    whole = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.mT), dim=-1)
    assert not torch.equal(cut, whole)
    assert_same_bits(cut[cut[:, 0].argsort()], whole[whole[:, 0].argsort()].detach())


def test_the_fewer_experts_the_farther_from_the_dense_model(
    model: torch.nn.Module, dense: Path, tmp_path: Path
) -> None:
    cut_into_experts(dense, tmp_path / "out", num_experts=8)
    wanted = dense_logits(model).log_softmax(-1)
    divergence = [
        float((wanted.exp() * (wanted - our_logits(tmp_path / "out", k).log_softmax(-1))).sum(-1).mean())
        for k in (8, 6, 3, 1)
    ]
    assert divergence[0] < 1e-6
    assert divergence == sorted(divergence)


def test_the_routers_noise_breaks_ties_token_by_token_and_weighs_nothing(dense: Path, tmp_path: Path) -> None:
    cut_into_experts(dense, tmp_path / "out", num_experts=8)
    params, config = load_pretrained(tmp_path / "out")
    trace = forward(params, IDS, replace(config, num_experts_per_tok=2))[1]
    assert all(len(layer.unique()) > 4 for layer in trace.expert_ids)  # ties would give two, the same for every token
    assert float((trace.weights - 0.5).abs().max()) < 1e-4


def test_a_dynamic_k_can_be_chosen(dense: Path, tmp_path: Path) -> None:
    cut_into_experts(dense, tmp_path / "out", num_experts=8, num_experts_per_tok=-1)
    params, config = load_pretrained(tmp_path / "out")
    assert config.num_experts_per_tok == -1
    active = forward(params, IDS, config, surprise_budget=0.5)[1].active
    assert 4 <= float(active.sum(-1).float().mean()) <= 5


# Clusters -------------------------------------------------------------------------------------------------------------


def test_calibration_sees_the_activations_of_the_dense_model(model: torch.nn.Module, dense: Path, text: Path) -> None:
    config, _ = read_config(dense, ("qwen3",))
    states = read_calibration(dense, text, config, read_headers(dense))
    hidden: list[Tensor] = []
    hooks = [
        m.mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for m in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor(list(TEXT.encode()[:1024])).view(8, 128))
    for hook in hooks:
        hook.remove()
    for index, wanted in enumerate(hidden):
        weights = {n.removesuffix(".weight"): w.detach() for n, w in model.model.layers[index].named_parameters()}
        states, calibration = calibrate(states, weights, config)
        assert_close(calibration.activations, wanted.flatten(0, 1), 1e-4, f"activations of layer {index}")


def test_clusters_cut_for_k_are_nearer_to_the_dense_model_than_slices(
    model: torch.nn.Module, dense: Path, text: Path, tmp_path: Path
) -> None:
    """On the text that they were fitted to: what is checked is that fitting works, not that it generalises."""
    ids = torch.tensor(list(TEXT.encode()[:128]))[None]
    wanted = dense_logits(model, ids)
    cut_into_experts(dense, tmp_path / "slices", num_experts=8, num_experts_per_tok=4)
    cut_into_experts(
        dense, tmp_path / "clusters", num_experts=8, num_experts_per_tok=4, split="clusters", calibration=text
    )
    errors = {out.name: float((our_logits(out, ids=ids) - wanted).norm()) for out in sorted(tmp_path.iterdir())}
    assert errors["clusters"] < 0.6 * errors["slices"]


def test_clusters_cut_for_k_add_up_the_experts_that_a_token_visits(dense: Path, text: Path, tmp_path: Path) -> None:
    """So its w2 is K times the dense one's rows, where that of all experts is E times."""
    how = dict(num_experts=8, split="clusters", calibration=text)
    cut_into_experts(dense, tmp_path / "all", **how)
    cut_into_experts(dense, tmp_path / "two", **how, num_experts_per_tok=2)
    every, two = (load_pretrained(tmp_path / name)[0]["layers"]["moe"] for name in ("all", "two"))
    assert_same_bits(two["w2"] * 4, every["w2"])
    assert_same_bits({n: two[n] for n in ("w1", "w3", "router")}, {n: every[n] for n in ("w1", "w3", "router")})


def test_the_fitted_router_ranks_experts_by_what_they_add() -> None:
    """Inputs of four kinds, each of which drives the neurons of one expert."""
    generator = seeded(0)
    kind = torch.randint(4, (300,), generator=generator)
    inputs = torch.randn(4, 16, generator=generator)[kind] + 0.1 * torch.randn(300, 16, generator=generator)
    activations = (kind[:, None] == torch.arange(12) // 3).float() + 0.1 * torch.rand(300, 12, generator=generator)
    calibration = Seen(inputs, activations, torch.randn(16, 12, generator=generator))
    chosen = (inputs @ fit_router(calibration, torch.arange(12), 4).mT).argmax(-1)
    assert (chosen == kind).float().mean() > 0.95


def test_neurons_that_fire_together_end_up_together() -> None:
    """Four groups of six neurons, each active on its own tokens, dealt out at random."""
    generator = seeded(0)
    group = torch.arange(24) // 6
    dealt = torch.randperm(24, generator=generator)
    active = (torch.arange(200)[:, None] % 4 == group[dealt]).float()
    activations = active * (1 + torch.rand(200, 24, generator=generator)) + 0.05 * torch.rand(
        200, 24, generator=generator
    )
    clusters = group[dealt][cluster_neurons(activations, 4)].view(4, 6)
    assert all(len(members.unique()) == 1 for members in clusters)


@given(clusters=st.integers(1, 6), size=st.integers(1, 5), seed=st.integers(0, 99), levels=st.sampled_from([1, 2, 50]))
def test_clusters_are_of_one_size_whatever_the_similarities_are(
    clusters: int, size: int, seed: int, levels: int
) -> None:
    similarity = torch.randint(levels, (clusters * size, clusters), generator=seeded(seed)).float()
    assert torch.bincount(assign_evenly(similarity, size), minlength=clusters).tolist() == [size] * clusters


@given(seed=st.integers(0, 99), silent=st.booleans())
def test_an_order_of_neurons_is_a_permutation(seed: int, silent: bool) -> None:
    activations = torch.zeros(7, 12) if silent else torch.randn(7, 12, generator=seeded(seed))
    assert sorted(cluster_neurons(activations, 3).tolist()) == list(range(12))


# Refused --------------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *flags: str) -> str:
    """The one line with which the command is refused; nothing is written."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main(["surgery", str(folder), "--out", str(out), *(flags or ("--num-experts", "8"))]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before
    return error


@pytest.mark.parametrize(("flags", "match"), [
    ("--num-experts 7", "expected a divisor of intermediate_size (24), got 7; near: 6, 8"),
    ("--num-experts 0", "expected a divisor"),
    ("--num-experts 8 --num-experts-per-tok 9", "expected 1 to 8, or -1"),
    ("--num-experts 8 --split clusters", "--calibration: expected a text file"),
    ("--num-experts 8 --calibration x.txt", "--calibration: expected a text file"),
    ("--num-experts 8 --split clusters --calibration nothing.txt", "nothing.txt: expected a file that can be read"),
    ("--num-experts 8 --split kmeans", "--split"),
    ("", ""),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(
    flags: str, match: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in refusal(capsys, dense, tmp_path / "out", *(flags.split() or ["--split=contiguous"]))


def test_a_calibration_text_that_is_too_short_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    flags = ["--num-experts=8", "--split=clusters", "--calibration", str(tmp_path / "short.txt")]
    assert "at least 128 tokens, got 5" in refusal(capsys, dense, tmp_path / "out", *flags)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_a_calibration_text_makes_overflow_are_refused_by_their_layer(
    value: float, copy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, name = copy / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    save_file(load_file(weights) | {name: torch.full((32, INNER), value)}, weights)
    flags = ["--num-experts=8", "--split=clusters", "--calibration", str(text)]
    message = refusal(capsys, copy, tmp_path / "out", *flags)
    assert "model.layers.1" in message
    assert "expected finite numbers" in message


def test_a_layer_that_reads_nothing_is_cut_all_the_same(copy: Path, text: Path, tmp_path: Path) -> None:
    weights, name = copy / "model.safetensors", "model.layers.1.post_attention_layernorm.weight"
    save_file(load_file(weights) | {name: torch.zeros(32)}, weights)
    cut_into_experts(copy, tmp_path / "out", num_experts=8, split="clusters", calibration=text)
    peer = transformers.AutoModelForCausalLM.from_pretrained(copy)
    assert_close(our_logits(tmp_path / "out"), dense_logits(peer), 1e-4, "logits")


@pytest.mark.parametrize(("changes", "match"), [
    (dict(model_type="qwen3_moe"), "this model has experts already"),
    (dict(model_type="qwen2"), "model_type: expected qwen3, got qwen2"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(intermediate_size=2**31 - 1), "mlp.gate_proj.weight: expected shape"),
    (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight"),
], ids=str)  # fmt: skip
def test_a_model_that_is_no_such_qwen3_is_refused(
    changes: dict[str, Any], match: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(values))
    assert match in refusal(capsys, copy, tmp_path / "out")


@pytest.mark.parametrize("case", ["missing", "shape", "truncated", "pickle", "no folder", "itself"])
def test_a_broken_folder_is_refused_and_nothing_is_written(
    case: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    if case == "missing":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    elif case == "shape":
        save_file(tensors | {name: torch.zeros(5, 32)}, weights)
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif case == "pickle":
        weights.rename(copy / "pytorch_model.bin")
    folder = tmp_path / "nothing" if case == "no folder" else copy
    message = refusal(capsys, folder, copy if case == "itself" else tmp_path / "out")
    wanted = {"missing": name, "shape": name, "truncated": "model.safetensors", "pickle": "a pickle"}
    assert wanted.get(case, "expected a") in message


def test_a_failure_in_the_last_layer_leaves_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(tensors: dict[str, Tensor], prefix: str, *rest: Any) -> dict[str, Tensor]:
        if prefix.endswith("1"):
            raise OSError(28, "No space left on device")
        return whole(tensors, prefix, *rest)

    whole = surgery._cut_layer
    monkeypatch.setattr(surgery, "_cut_layer", failing)
    with pytest.raises(ValueError, match="No space left"):
        cut_into_experts(dense, tmp_path / "out", num_experts=8)
    assert [*tmp_path.iterdir()] == []


def test_most_of_a_checkpoint_is_never_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a shard is written, the tensors that live are a few layers' of eight."""
    dense_model(num_hidden_layers=8, vocab_size=64).save_pretrained(tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    held: list[int] = []
    born: list[tuple[weakref.ref[Tensor], int]] = []

    def reading(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read(*arguments):
            born.append((weakref.ref(tensor), tensor.nbytes))
            yield name, tensor

    def cutting(*arguments: Any) -> dict[str, Tensor]:
        result = cut(*arguments)
        born.extend((weakref.ref(tensor), tensor.nbytes) for tensor in result.values())
        return result

    def saving(*arguments: Any, **options: Any) -> None:
        held.append(sum(nbytes for tensor, nbytes in born if tensor() is not None))
        save(*arguments, **options)

    read, cut, save = surgery.read_tensors, surgery._cut_layer, folder.save_file
    monkeypatch.setattr(surgery, "read_tensors", reading)
    monkeypatch.setattr(surgery, "_cut_layer", cutting)
    monkeypatch.setattr(folder, "save_file", saving)
    monkeypatch.setattr(surgery, "SHARD_BYTES", 1)
    cut_into_experts(tmp_path / "dense", tmp_path / "out", num_experts=8)
    assert len(held) == 10
    assert size / 10 < max(held) < size / 2
    load_pretrained(tmp_path / "out")


PEAK = """
import sys, torch, training.commands.surgery, training.commands.clusters
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
training.commands.surgery.cut_into_experts(sys.argv[1], sys.argv[2], num_experts=8)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak of a process from")
def test_the_peak_of_memory_is_no_more_than_the_checkpoint_and_a_fifth(tmp_path: Path) -> None:
    """Where streaming by layers helps least: an embedding that is most of the checkpoint."""
    sizes = dict(vocab_size=48_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    dense_model(**sizes).save_pretrained(tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert size > 100 << 20
    command = [sys.executable, "-c", PEAK, str(tmp_path / "dense"), str(tmp_path / "out")]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 1.2 * size


# The page -------------------------------------------------------------------------------------------------------------


def test_the_commands_and_the_code_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    dense_model(intermediate_size=64).save_pretrained("Qwen3-0.6B")
    Path("Qwen3-0.6B", "tokenizer.json").write_text(byte_tokenizer())
    Path("text.txt").write_text(TEXT)
    Path("runs").mkdir()
    make_run(Path("runs/mine"))
    make_run(Path("runs/budget"), num_experts_per_tok=-1)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for kind, block in blocks if kind == "bash" for line in block.splitlines()]
    for command in commands:
        assert command[0] == "tiny-onn"
        assert main(command[1:]) == 0, capsys.readouterr().err
        if "--out" in command:
            wanted = {"tokenizer": "tokenizer.json", "train": "summary.json"}.get(command[1], "config.json")
            assert Path(command[command.index("--out") + 1], wanted).is_file()
    codes = [block for kind, block in blocks if kind == "python"]
    for code in codes:
        exec(compile(code, "huggingface.md", "exec"), {})
    assert (len(commands), len(codes)) == (15, 2)
    assert "def " in capsys.readouterr().out


# Where it is written --------------------------------------------------------------------------------------------------


def test_an_earlier_result_is_replaced_only_when_that_is_asked_for(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["surgery", str(dense), "--out", str(tmp_path / "out"), "--num-experts"]
    assert main([*command, "8"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main([*command, "3"]) == 2
    said = capsys.readouterr().err
    assert "--out: expected a new or empty folder, got " in said
    assert "add --force to replace it" in said
    assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main([*command, "3", "--force"]) == 0
    assert load_pretrained(tmp_path / "out")[1].num_experts == 3
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main([*command, "8", "--force"]) == 2
    assert "got one with 'mine.txt'" in capsys.readouterr().err


def test_an_earlier_export_is_replaced_only_when_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(make_run(tmp_path / "run")), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "add --force to replace it" in capsys.readouterr().err
    assert main([*command, "--force", "--num-experts-per-tok", "1"]) == 0
    assert load_pretrained(tmp_path / "out")[1].num_experts_per_tok == 1
