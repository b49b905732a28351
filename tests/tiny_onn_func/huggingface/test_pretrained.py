"""Folders of Hugging Face: what goes out opens there with our logits, what comes in is theirs or refused in a line."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the network

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward, load_pretrained, save_pretrained
from tiny_onn_func.huggingface.config import _parse
from tiny_onn_func.huggingface.folder import write_folder
from tiny_onn_func.tree import Tree, flatten, tree_map, unflatten
from training.cli import main
from training.data.streams import decode, encode
from training.run.config import RunConfig
from training.run.settings import save_settings
from training.storage.checkpoint import load_params, save_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of their numbers
    transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TIED = (True, False)
INDEX = "model.safetensors.index.json"
PIECE = "model.layers.0.self_attn.q_proj.weight"


def config_of(tied: bool = True, **changes: Any) -> ModelConfig:
    """Widths that transformers' grouped matmul takes: rows of whole 16 bytes."""
    sizes = dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=6, moe_intermediate_size=8,
        num_experts=4, num_experts_per_tok=2, rope_theta=5000.0, tie_word_embeddings=tied,
    )  # fmt: skip
    return tiny_config(**sizes | changes)


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments of their Qwen3MoeConfig."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "moe_intermediate_size", "num_experts", "num_experts_per_tok", "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {name: getattr(config, name) for name in names} | dict(norm_topk_prob=True, rope_parameters=rope)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, norms too: a fresh model hides what is not copied."""
    generator = seeded(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return model.eval()


def saved_peer(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, **how: Any) -> torch.nn.Module:
    """A random Qwen3-MoE of theirs, written by them."""
    peer = randomized(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes_of(config)))).to(dtype)
    peer.save_pretrained(folder, **how)
    return peer


def logits_of(params: Tree, config: ModelConfig, **options: Any) -> Tensor:
    with torch.no_grad():
        return forward(params, tiny_batch(config, 2, 9).input_ids, config, **options)[0]


def their_logits(model: torch.nn.Module, config: ModelConfig) -> Tensor:
    with torch.no_grad():
        return model(tiny_batch(config, 2, 9).input_ids).logits


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `save_pretrained`, for copies."""
    folder = tmp_path_factory.mktemp("interop") / "ours"
    save_pretrained(spread_params(config_of(), dtype=torch.float32), config_of(), folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded folder of theirs, for copies."""
    folder = tmp_path_factory.mktemp("interop") / "sharded"
    saved_peer(folder, config_of(), max_shard_size="8KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


@pytest.fixture
def copy(ours: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ours, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


# Out ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", TIED)
def test_what_we_save_opens_in_transformers_with_our_logits(tied: bool, tmp_path: Path) -> None:
    config = config_of(tied)
    params = spread_params(config, dtype=torch.float32)
    save_pretrained(params, config, tmp_path / "out")
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_close(their_logits(peer, config), logits_of(params, config), 1e-4, "logits")


@pytest.mark.parametrize(("changes", "dtype"), [
    (dict(), torch.float32),
    (dict(), torch.float16),
    (dict(tie_word_embeddings=False, rms_norm_eps=3e-5, rope_theta=1e6 + 0.1), torch.float64),
    (dict(num_experts_per_tok=-1, min_experts_per_tok=2, max_experts_per_tok=3), torch.bfloat16),
    (dict(num_experts=1, num_experts_per_tok=1, num_hidden_layers=1), torch.float32),
])  # fmt: skip
def test_the_round_trip_is_bitwise(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    config = config_of(**changes)
    params = spread_params(config, dtype=dtype)
    save_pretrained(params, config, tmp_path / "out")
    loaded, sizes = load_pretrained(tmp_path / "out")
    assert sizes == config
    assert_same_bits(loaded, params)


def test_a_router_in_float32_and_a_bias_come_back_bitwise(tmp_path: Path) -> None:
    config = config_of()
    flat = flatten(spread_params(config, dtype=torch.bfloat16))
    flat["layers.moe.router"] = flat["layers.moe.router"].float()
    flat["layers.moe.router_bias"] = torch.randn(2, 4, generator=seeded(0))
    save_pretrained(unflatten(flat), config, tmp_path / "out")
    assert_same_bits(load_pretrained(tmp_path / "out")[0], unflatten(flat))


@pytest.mark.parametrize("case", ["dynamic", "bias", "token", "hash", "thresholds"])
def test_what_qwen3_moe_cannot_express_is_refused_there_and_never_computed_differently(
    case: str, tmp_path: Path
) -> None:
    routing = case if case in ("token", "hash", "thresholds") else "router"
    config = config_of(num_experts_per_tok=-1 if case in ("dynamic", "thresholds") else 2, routing=routing)
    params = spread_params(config, dtype=torch.float32)
    if case == "bias":
        params["layers"]["moe"]["router_bias"] += 0.5
    save_pretrained(params, config, tmp_path / "out")
    assert load_pretrained(tmp_path / "out")[1] == config
    with pytest.raises(ValueError, match="tiny_onn"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_saving_again_replaces_and_leaves_no_draft(ours: Path, copy: Path) -> None:
    params, config = load_pretrained(ours)
    save_pretrained(tree_map(lambda leaf: leaf + 1, params), config, copy)
    assert_same_bits(load_pretrained(copy)[0], tree_map(lambda leaf: leaf + 1, params))
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert (copy / "model.safetensors").stat().st_mode == (copy / "config.json").stat().st_mode


@pytest.mark.parametrize("file", ["notes.txt", "model.safetensors"])
def test_a_folder_of_something_else_is_never_written_into(file: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_pretrained(spread_params(config_of()), config_of(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_half_way_leaves_what_was_there(ours: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    params, config = load_pretrained(ours)
    monkeypatch.setattr("tiny_onn_func.huggingface.folder._flush", full)
    with pytest.raises(ValueError, match="No space left on device"):
        save_pretrained(tree_map(lambda leaf: leaf + 1, params), config, copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert_same_bits(load_pretrained(copy)[0], params)


def test_many_shards_hold_the_same_model(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_onn_func.huggingface.pretrained.write_folder", partial(write_folder, shard_bytes=20_000))
    params, config = load_pretrained(ours)
    save_pretrained(params, config, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).exists()
    assert_same_bits(load_pretrained(tmp_path / "out")[0], params)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(their_logits(peer, config), logits_of(params, config), 1e-4, "logits")


# In -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("how", [dict(), dict(save_original_format=False), dict(max_shard_size="8KB")])
def test_what_transformers_saves_loads_with_its_logits(how: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    config = config_of(tied)
    peer = saved_peer(tmp_path, config, **how)
    params, sizes = load_pretrained(tmp_path)
    assert sizes == config
    assert_close(logits_of(params, config), their_logits(peer, config), 1e-4, "logits")


def test_bfloat16_comes_in_as_it_is(tmp_path: Path) -> None:
    peer = saved_peer(tmp_path, config_of(), torch.bfloat16)
    params, _ = load_pretrained(tmp_path)
    assert_same_bits(params["embed_tokens"], peer.get_input_embeddings().weight)
    assert {leaf.dtype for leaf in flatten(params).values()} == {torch.bfloat16}


@pytest.mark.parametrize("spelling", [
    dict(rope_theta=None, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    dict(rope_theta=5000, rope_scaling=None),
    dict(num_experts=None, num_local_experts=4),
    dict(num_local_experts=4),
    dict(torch_dtype=None, dtype="float32"),
    dict(tiny_onn=None, architectures=None),
    dict(sliding_window=4096, layer_types=["full_attention"] * 2),
], ids=str)  # fmt: skip
def test_both_spellings_of_the_configuration_mean_the_same(spelling: dict[str, Any], copy: Path) -> None:
    edit(copy, **spelling)
    assert load_pretrained(copy)[1] == config_of()


def test_a_tied_model_may_store_its_head_again_but_no_other_one(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    load_pretrained(copy)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, copy / "model.safetensors")
    assert_refused(copy, r"model.safetensors: lm_head.weight: expected the embedding")


# Refused --------------------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("changes", "match"), [
    (dict(mlp_only_layers=[0]), "mlp_only_layers: expected .*, got .0."),
    (dict(decoder_sparse_step=2), "decoder_sparse_step: expected 1"),
    (dict(norm_topk_prob=False), "norm_topk_prob: expected true.*got false"),
    (dict(norm_topk_prob=None), "norm_topk_prob: expected true.*got false"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(layer_types=7), "layer_types"),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling: .*yarn"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "rope_theta: expected one value"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 5000.0}}), "rope_parameters"),
    (dict(rope_parameters=[1]), "rope_parameters: expected an object"),
    (dict(attention_bias=True), "attention_bias: expected false"),
    (dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size"),
    (dict(hidden_act="gelu"), "hidden_act: expected .silu."),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    (dict(model_type="llama"), "model_type: expected qwen3_moe or tiny_onn, got llama"),
    (dict(model_type="qwen3"), "tiny-onn surgery"),
    (dict(model_type=None), "model_type"),
    (dict(architectures=["Qwen3MoeForTokenClassification"]), "architectures"),
    (dict(hidden_size=None), "hidden_size: expected a whole number .*, got no such key"),
    (dict(hidden_size="32"), 'hidden_size: .*got 32'),
    (dict(hidden_size=True), "hidden_size"),
    (dict(hidden_size=-32), "hidden_size"),
    (dict(hidden_size=10**4000), "hidden_size: .* bits"),
    (dict(hidden_size=2**30), r"model.embed_tokens.weight: expected shape \(13, 1073741824\)"),
    (dict(num_hidden_layers=2**31 - 1), "expected the tensor model.layers.2.input_layernorm.weight"),
    (dict(num_hidden_layers=1), "expected no tensor model.layers.1"),
    (dict(num_experts=2**31 - 1), "model.layers.0.mlp.gate.weight: expected shape"),
    (dict(num_local_experts=5), "num_local_experts"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok"),
    (dict(num_experts_per_tok=-1), "num_experts_per_tok"),
    (dict(vocab_size=14), "model.embed_tokens.weight: expected shape"),
    (dict(tie_word_embeddings=False), "expected the tensor lm_head.weight"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings"),
    (dict(rms_norm_eps=0), "rms_norm_eps"),
    (dict(rope_theta=10**400), "rope_theta"),
    (dict(tiny_onn={"format": 2}), "tiny_onn: expected an object with format 1"),
    (dict(tiny_onn=[]), "tiny_onn"),
], ids=str)  # fmt: skip
def test_a_configuration_that_we_do_not_compute_is_refused_by_its_key(
    changes: dict[str, Any], match: str, copy: Path
) -> None:
    edit(copy, **changes)
    assert_refused(copy, match)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": ' * 100_000, b"9" * 5000, b'"\\ud800\\n"'],
    ids=lambda content: repr(content[:8]),
)
def test_a_config_that_is_no_json_object_is_refused(content: bytes, copy: Path) -> None:
    (copy / "config.json").write_bytes(content)
    assert_refused(copy, r"config.json: expected")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_any_value_under_any_key_is_understood_or_refused_in_one_line(ours: Path, data: st.DataObject) -> None:
    values = json.loads((ours / "config.json").read_text())
    extra = ["rope_parameters", "num_local_experts", "layer_types", "quantization_config", "n_shared_experts"]
    keys = data.draw(st.lists(st.sampled_from([*values, *extra]), min_size=1, max_size=3))
    values |= {key: data.draw(JSON) for key in keys}
    try:
        assert isinstance(_parse(values, ("qwen3_moe", "tiny_onn")), ModelConfig)
        return
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert any(key in message for key in [*keys, "num_experts"])


def broken(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t.pop(PIECE), f"expected the tensor {PIECE} of shape .24, 32., got none"),
    (lambda t: t.update({PIECE: t[PIECE].mT.contiguous()}), rf"model.safetensors: {PIECE}: expected shape .24, 32."),
    (lambda t: t.update({PIECE: t[PIECE].to(torch.int8)}), rf"model.safetensors: {PIECE}: expected one of F64.*got I8"),
    (lambda t: t.update({PIECE: torch.zeros(())}), rf"{PIECE}: expected shape"),
    (lambda t: t.update(extra=torch.zeros(1)), "model.safetensors: expected no tensor extra, got one of shape"),
    (lambda t: t.update({"two\nlines": torch.zeros(1)}), "expected no tensor 'two.*nlines'"),
    (lambda t: t.clear(), "expected the tensor model.embed_tokens.weight"),
], ids=["missing", "transposed", "integers", "a number", "extra", "odd name", "empty"])  # fmt: skip
def test_tensors_that_are_not_the_configurations_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], match: str, copy: Path
) -> None:
    broken(copy, change)
    assert_refused(copy, match)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(kept: int, copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:kept])
    assert_refused(copy, r"model.safetensors: expected safetensors")


@pytest.mark.parametrize("header", [
    b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551600]}}',
    b'{"a":' * 100,
], ids=["overflow", "beyond the end", "no header"])  # fmt: skip
def test_a_header_that_lies_is_refused(header: bytes, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert_refused(copy, r"model.safetensors: expected safetensors")


def test_a_pickle_is_never_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert_refused(copy, r"expected model.safetensors .*got pytorch_model.bin, a pickle")
    assert not Path("owned").exists()


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    lost = sorted({*json.loads((shards / INDEX).read_text())["weight_map"].values()})[1]
    (shards / lost).unlink(missing_ok=True)
    assert_refused(shards, rf"{lost}: expected the shard that {INDEX} names")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 7, None]
)
def test_an_index_that_points_elsewhere_is_refused(place: object, shards: Path) -> None:
    save_file({PIECE: torch.zeros(24, 32)}, shards.parent / "model.safetensors")
    places = json.loads((shards / INDEX).read_text())["weight_map"]
    edit(shards, INDEX, weight_map=places | {PIECE: place})
    assert_refused(shards, rf"{INDEX}: {PIECE}: expected a .safetensors file beside it")


@pytest.mark.parametrize("case", ["elsewhere", "not there", "untold", "no map"])
def test_an_index_that_disagrees_with_its_shards_is_refused(case: str, shards: Path) -> None:
    places = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(shard for shard in places.values() if shard != places[PIECE])
    changed = {
        "elsewhere": places | {PIECE: other},
        "not there": places | {"ghost": other},
        "untold": {name: shard for name, shard in places.items() if name != PIECE},
        "no map": [],
    }[case]
    edit(shards, INDEX, weight_map=changed)
    assert_refused(shards, "ghost" if case == "not there" else "weight_map" if case == "no map" else PIECE)


def test_a_folder_that_is_none_is_refused(tmp_path: Path, copy: Path) -> None:
    assert_refused(tmp_path / "nothing", "expected a folder with a model, got nothing")
    assert_refused(copy / "config.json", "expected a folder with a model, got a file")
    (copy / "config.json").unlink()
    assert_refused(copy, "config.json: expected a file, got nothing there")


def test_nothing_is_allocated_before_the_headers_are_right(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made")

    edit(copy, hidden_size=2**30, vocab_size=2**30)
    monkeypatch.setattr("tiny_onn_func.huggingface.pretrained.torch.zeros", never)
    monkeypatch.setattr("tiny_onn_func.huggingface.pretrained.read_tensors", never)
    assert_refused(copy, "model.embed_tokens.weight")


# A run ----------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, *, bias: float = 0.0, **changes: Any) -> Path:
    """A run folder with a random model, as if it had trained."""
    model = config_of(vocab_size=257, **changes)
    params = spread_params(model, dtype=torch.float32)
    params["embed_tokens"] *= 20  # so that the model looks at what it reads
    params["layers"]["moe"]["router_bias"] += bias
    folder.mkdir()
    save_settings(RunConfig(model=model, sequence_length=64), folder / "config.yaml")
    save_checkpoint(folder, {"params": params, "step": torch.tensor(1)}, asdict(model), keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("interop") / "run", tied=False)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main(["export", str(run), "--out", str(run.parent / "exported")]) == 0
    return run.parent / "exported"


@pytest.mark.parametrize("prompt", ["def ", "n\u00e9 \u6f22 <|endoftext|>"])
def test_an_exported_run_writes_the_same_greedy_text_there(
    prompt: str, run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as prompt and text fit into the sequence length: ours looks at that many tokens, theirs at all."""
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", prompt, "--tokens", "36", "--temperature", "0"]) == 0
    peer = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = peer.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=36)
    assert len({*tokens[0, -36:].tolist()}) > 5
    assert tokenizer.decode(tokens[0]) + "\n" == capsys.readouterr().out


def test_a_folder_for_hugging_face_writes_here_too(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tokens", "30", "--temperature", "0"]
    capsys.readouterr()
    assert main(["generate", str(run), *flags]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", str(exported), *flags]) == 0
    assert capsys.readouterr().out == wanted
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in refusal(["generate", str(tmp_path)], capsys)


def test_a_folder_without_a_tokenizer_writes_bytes_if_it_has_the_room(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(spread_params(config_of(vocab_size=257), dtype=torch.bfloat16), config_of(vocab_size=257), tmp_path)
    assert main(["generate", str(tmp_path), "--tokens", "3", "--no-stop"]) == 0
    assert "vocab_size" in refusal(["generate", str(ours)], capsys)


def test_a_trained_run_of_the_default_sizes_writes_the_same_greedy_text_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset for exports and the default's text; few steps, little scoring."""
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    short = ["--steps=25", "--hyper.warmup-steps=5", "--final-eval-bytes=4096", "--sample-tokens=0", "--split=tail"]
    assert main(["train", "--config", "small_qwen3", "--data", "stdlib:json/*.py", *short, "--out", run]) == 0
    assert main(["export", run, "--out", out]) == 0
    capsys.readouterr()
    assert main(["generate", run, "--tokens", "60", "--temperature", "0", "--context", "0"]) == 0
    peer = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = peer.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=60)
    assert tokenizer.decode(tokens[0]) + "\n" == capsys.readouterr().out


def test_an_exported_run_loads_here_bitwise(run: Path, exported: Path) -> None:
    params, config = load_params(run)
    loaded, sizes = load_pretrained(exported)
    assert sizes == config
    assert_same_bits(loaded, params)


@given(text=st.text())
def test_the_exported_tokenizer_is_ours_on_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer(text)["input_ids"] == encode(text).tolist()
    assert tokenizer.decode(encode(text).tolist()) == decode(encode(text)) == text


@given(tokens=st.lists(st.integers(0, 256) | st.sampled_from([256, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0x20])))
def test_the_exported_tokenizer_decodes_any_tokens_as_we_do(tokenizer: Any, tokens: list[int]) -> None:
    assert tokenizer.decode(tokens) == decode(tokens)


@pytest.fixture(scope="module")
def tokenizer(exported: Path) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (257, 256, 256, None)
    return loaded


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_dynamic_run_is_exported_at_a_k_that_the_user_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", num_experts_per_tok=-1), tmp_path / "out"
    (run / "summary.json").write_text('{"avg_k": 2.345}')
    message = refusal(["export", str(run), "--out", str(out)], capsys)
    assert "dynamic K" in message
    assert "--num-experts-per-tok K" in message
    assert "2.3 on average" in message
    for wrong in ("0", "5", "-1"):
        assert "1 to 4" in refusal(["export", str(run), "--out", str(out), f"--num-experts-per-tok={wrong}"], capsys)
    assert not out.exists()
    assert main(["export", str(run), "--out", str(out), "--num-experts-per-tok", "3"]) == 0
    params, config = load_pretrained(out)
    assert config.num_experts_per_tok == 3
    peer = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert_close(their_logits(peer, config), logits_of(params, config), 1e-4, "logits")


def test_a_run_with_a_selection_bias_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(["export", str(make_run(tmp_path / "run", bias=0.1)), "--out", str(tmp_path / "out")], capsys)
    assert "selection bias" in message
    assert not (tmp_path / "out").exists()


def test_an_export_over_something_else_or_of_nothing_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected a new or empty folder" in refusal(["export", str(run), "--out", str(run)], capsys)
    assert "expected a run folder" in refusal(["export", str(tmp_path), "--out", str(tmp_path / "out")], capsys)
    assert [*tmp_path.iterdir()] == []
