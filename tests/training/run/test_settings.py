"""A setting means the same in YAML, as a flag and in Python; a mistake is one line that names its key."""

import ast
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import ROOT
from tiny_onn_func.config import ModelConfig
from training.errors import UserError
from training.presets.find import HOME
from training.run import config as config_source
from training.run.config import DEFAULT_HYPER, KEYS, PLAIN_MODEL, RunConfig, default_out, hyper_params, plain_values
from training.run.describe import differing
from training.run.settings import FIRST, load_settings, parse_train_args, save_settings
from training.step.hyper_params import HyperParams
from training.step.surprise import KINDS
from training.storage.loggers import logger_names
from training.storage.plain_yaml import read_yaml, scalar, write_yaml, yaml_text
from training.storage.typed import kinds_of

PRESETS = sorted(HOME.glob("*.yaml"))


def load(folder: Path, text: str, overrides: dict | None = None) -> RunConfig:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return load_settings(str(folder / "x.yaml"), overrides)


def complaint(function, *args, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parse(*argv: str) -> RunConfig:
    return parse_train_args(argv)[0]


# What the settings are


NUMBERS = [key.partition(".")[2] for key in KEYS if key.startswith("hyper.")]


def test_what_follows_from_the_run_is_no_setting():
    assert [name for name in HyperParams._fields if name not in ("total_steps", "decay_steps")] == NUMBERS
    for name in ("total_steps", "decay_steps"):
        wanted = f"hyper.{name}: expected 0, as it follows from steps and schedule, got 5"
        assert complaint(RunConfig, hyper=HyperParams(**{name: 5})) == wanted


def test_the_default_preset_says_what_the_code_says():
    assert load_settings(str(HOME / "small.yaml")) == RunConfig()
    assert load_settings() == RunConfig()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_spell_out_every_key(path):
    load_settings(str(path))
    settings = read_yaml(str(path))
    assert list(settings) == list(plain_values(RunConfig()))
    assert set(settings["model"]) == {field.name for field in fields(ModelConfig)}
    assert set(settings["hyper"]) == {*NUMBERS}


def test_where_a_run_differs_from_hyper_params_is_said_in_help_and_in_the_source(capsys):
    assert differing(DEFAULT_HYPER, HyperParams()) == ["lr", "warmup_steps", "balance_weight"]
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "HyperParams() of Python has lr 0.003, warmup_steps 0, balance_weight 0, no cosine." in page
    source = " ".join(Path(config_source.__file__).read_text(encoding="utf-8").split())
    assert "lr 2e-3 (there 3e-3), a warm-up of 50 steps (there none), balance_weight 1.0 (there 0)" in source
    run, plain = hyper_params(RunConfig()), HyperParams()
    assert (run.lr, plain.lr, run.warmup_steps, run.balance_weight, plain.total_steps) == (2e-3, 3e-3, 50, 1.0, 0)


def test_seed_v6_is_the_plan_without_any_guard():
    config = load_settings(str(HOME / "seed_v6.yaml"))
    model, hyper = config.model, config.hyper
    assert (model.num_experts_per_tok, model.min_experts_per_tok, model.max_experts_per_tok) == (-1, 1, None)
    assert (hyper.pi_alpha, hyper.min_candidates, hyper.surprise_weight, hyper.surprise_sign) == (0.5, 1, 1.0, 1.0)
    assert (hyper.balance_weight, hyper.z_weight, hyper.bias_speed, hyper.explore_prob) == (0, 0, 0, 0)
    assert hyper.router_coupling == 0


def test_shakespeare_char_is_2000_steps_of_12_x_64_with_the_tail_held_out():
    config = load_settings(str(HOME / "shakespeare_char.yaml"))
    assert (config.steps, config.batch_size, config.sequence_length) == (2000, 12, 64)
    assert (config.split, config.holdout) == ("tail", 0.1)


def test_the_cosine_ends_at_the_last_step_and_a_constant_schedule_has_no_end():
    assert hyper_params(RunConfig(steps=70)).total_steps == 70
    assert hyper_params(RunConfig(steps=70, schedule="constant")).total_steps == 0
    assert all(isinstance(value, int | float) for value in hyper_params(RunConfig()))


def test_wsd_decays_over_the_last_share_of_the_steps():
    config = RunConfig(steps=1000, schedule="wsd", hyper=HyperParams(warmup_steps=50))
    assert hyper_params(config).total_steps == 1000
    for share, decay in ((0.2, 200), (0.1, 100), (0.0001, 1), (0.95, 950), (1.0, 1000)):
        assert hyper_params(replace(config, decay_share=share)).decay_steps == decay
    assert hyper_params(replace(config, steps=20)).decay_steps == 4
    assert hyper_params(replace(config, schedule="cosine")).decay_steps == 0
    assert hyper_params(replace(config, schedule="constant")).decay_steps == 0


def test_a_run_shorter_than_its_warm_up_warms_up_until_its_end():
    config = RunConfig(steps=70, hyper=HyperParams(warmup_steps=100, lr=0.5))
    assert hyper_params(config).warmup_steps == 70
    assert hyper_params(replace(config, steps=200)).warmup_steps == 100
    assert hyper_params(config).lr == 0.5


# YAML


def test_a_partial_file_is_merged_over_the_defaults_in_nested_sections_too(tmp_path):
    config = load(tmp_path, "steps: 5\nmodel:\n  num_experts: 8\nhyper:\n")
    default = RunConfig()
    assert config == replace(default, steps=5, model=replace(default.model, num_experts=8))


def test_numbers_need_no_dot_and_integers_serve_as_floats(tmp_path):
    config = load(tmp_path, "hyper: {lr: 1e-3, router_lr: 1, eps: 1.e-7, pi_alpha: .5, balance_weight: 1E+1}")
    assert [config.hyper.lr, config.hyper.router_lr, config.hyper.eps] == [1e-3, 1.0, 1e-7]
    assert [config.hyper.pi_alpha, config.hyper.balance_weight] == [0.5, 10.0]
    assert type(config.hyper.router_lr) is float


def test_text_that_yaml_1_1_would_turn_into_something_else_stays_text(tmp_path):
    for text in ("on", "no", "12:30", "2024-01-01", "0x10"):
        assert load(tmp_path, f"prompt: {text}").prompt == text


# A config.yaml as runs wrote it with PyYAML: "1.0e-05", a text that is escaped and folded.
OLD = r"""
data: 'none'
tokenizer: bytes
out: null
steps: 7
seed: 0
final_eval_bytes: null
prompt: "\xE9\nnone word word\
  \ word "
model:
  rms_norm_eps: 1.0e-06
  rope_theta: 10000.0
hyper:
  lr: 1.0e-05
  router_lr: 0.001
  eps: 1.0e-08
  surprise_sign: 1.0
  shuffle_targets: 0.0
  explore_seed: 0
"""


def test_the_config_yaml_of_an_older_run_opens(tmp_path):
    hyper = DEFAULT_HYPER._replace(lr=1e-5)
    wanted = RunConfig(steps=7, prompt="é\nnone word word word ", data="none", final_eval_bytes=None, hyper=hyper)
    assert load(tmp_path, OLD) == wanted


def test_equal_settings_are_equal_and_hash_alike():
    one, other = (RunConfig(steps=200, hyper=HyperParams(lr=1e-3)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, replace(one, seed=1), replace(one, hyper=HyperParams(lr=2e-3))}) == 3


def test_no_logger_is_none_in_a_file_and_on_the_command_line(tmp_path):
    assert logger_names(load(tmp_path, "log: none").log) == logger_names(parse("--log", "none").log) == ()
    assert logger_names(load(tmp_path, "log: csv, wandb").log) == ("csv", "wandb")


MISTAKES = {
    "log: csv,csv": "log: expected none, or some of tensorboard, csv, trackio, wandb with commas between, "
    "got 'csv,csv'",
    "model: {num_expert: 3}": "model.num_expert: unknown key, did you mean model.num_experts?",
    "stepss: 3": "stepss: unknown key, did you mean steps?",
    "pi_alpha: 0.5": "pi_alpha: unknown key, did you mean hyper.pi_alpha?",
    "hyper: {total_steps: 5}": "hyper.total_steps: unknown key, did you mean steps?",
    "1: 2": "1: unknown key; `tiny-onn train --help` lists them all",
    '"a\\nb": 2': "'a\\nb': unknown key; `tiny-onn train --help` lists them all",
    "hyper: {lr: fast}": "hyper.lr: expected a number, got 'fast'",
    "hyper: {lr: .nan}": "hyper.lr: expected a number, got nan",
    "hyper: {lr: 1e999}": "hyper.lr: expected a number, got inf",
    "hyper: {lr: true}": "hyper.lr: expected a number, got True",
    "steps: true": "steps: expected a whole number, got True",
    "steps: 10.0": "steps: expected a whole number, got 10.0",
    "steps: '10'": "steps: expected a whole number, got '10'",
    "steps: 017": "steps: expected a whole number, got 17.0",
    "steps:": "steps: expected a whole number, got None",
    "steps: 100000000000000000000": "steps: expected a whole number, got 1e+20",
    "steps: {a: 1}": "steps: expected a whole number, got {'a': 1}",
    "prompt: 5": "prompt: expected text or null, got 5",
    "final_eval_bytes: some": "final_eval_bytes: expected a whole number or null, got 'some'",
    "surprise_kind: bananas": "surprise_kind: expected one of w2, unweighted, experts, input, benefit, oracle, got "
    "'bananas'",
    "on_nonfinite: go": "on_nonfinite: expected one of stop, skip, got 'go'",
    "split: random": "split: expected one of auto, document, tail, got 'random'",
    "model: {tie_word_embeddings: 1}": "model.tie_word_embeddings: expected true or false, got 1",
    "model: 5": "model: expected keys and values below it, got 5",
    "hyper: [1]": "hyper: expected keys and values below it, got [1]",
    "steps: 0": "steps: expected 1 or more, got 0",
    "seed: -1": "seed: expected 0 to 2**63 - 1, got -1",
    "batch_size: 0": "batch_size: expected 1 or more, got 0",
    "accumulate: 0": "accumulate: expected 1 or more, got 0",
    "accumulate: 5": "accumulate: expected a divisor of batch_size (12), got 5; change one of them",
    "surprise_kind: oracle\naccumulate: 2": "accumulate: expected 1 with surprise_kind oracle, which samples the whole "
    "batch, got 2; leave it away",
    "sequence_length: 1": "sequence_length: expected 2 or more, got 1",
    "stop_when: -1": "stop_when: expected 0 or more, got -1",
    "stop_when: 3\neval_every: 0": "stop_when: expected 0 with eval_every 0, which scores at the end only, got 3; "
    "set eval_every, or leave it away",
    "schedule: linear": "schedule: expected one of cosine, wsd, constant, got 'linear'",
    "decay_share: 0": "decay_share: expected more than 0 and at most 1, got 0.0",
    "decay_share: 1.5": "decay_share: expected more than 0 and at most 1, got 1.5",
    "holdout: 0": "holdout: expected more than 0 and less than 1, got 0.0",
    "holdout: 1": "holdout: expected more than 0 and less than 1, got 1.0",
    "keep_checkpoints: 0": "keep_checkpoints: expected 1 or more, got 0",
    "eval_every: -1": "eval_every: expected 0 or more, got -1",
    "threads: 100000": "threads: expected 0 to 4,096, got 100000",
    "data: ''": "data: expected some text, got ''",
    "hyper: {pi_alpha: 0}": "hyper.pi_alpha: expected more than 0 and at most 1, got 0.0",
    "hyper: {pi_alpha: 1.01}": "hyper.pi_alpha: expected more than 0 and at most 1, got 1.01",
    "hyper: {explore_prob: 1.5}": "hyper.explore_prob: expected 0 to 1, got 1.5",
    "hyper: {lr: -1e-3}": "hyper.lr: expected 0 or more, got -0.001",
    "hyper: {max_grad_norm: 0}": "hyper.max_grad_norm: expected more than 0, got 0.0",
    "hyper: {warmup_steps: -1}": "hyper.warmup_steps: expected 0 or more, got -1",
    "hyper: {beta2: 1}": "hyper.beta2: expected 0 or more and less than 1, got 1.0",
    "hyper: {surprise_sign: 0}": "hyper.surprise_sign: expected 1 or -1, got 0.0",
    "model: {head_dim: 3}": "model.head_dim: expected an even number (rotary pairs), got 3",
    "model: {min_experts_per_tok: 17}": "model.min_experts_per_tok: expected 1 to max_experts_per_tok (16), got 17",
    "model: {vocab_size: 256}": "model.vocab_size: expected 257 (256 bytes and the document boundary) or more, got 256",
    "model: {hidden_size: 64}\nmodel.hidden_size: 32": "model.hidden_size is given twice",
    "steps: 5\nsteps: 6": 'line 2: found duplicate key "steps" with value "6" (original value: "5")',
    "model:\n  hidden_size: 8\n  hidden_size: 8": 'line 3: found duplicate key "hidden_size" with value "8" '
    '(original value: "8")',
    "steps: !!bool x": "expected values that fit their tags, got: 'x'; remove the tags (!!...)",
    "steps: [": "line 1: expected the node content, but found '<stream end>'",
    "steps": "expected keys and values, such as `steps: 100`, got 'steps'",
    "- steps": "expected keys and values, such as `steps: 100`, got ['steps']",
    "# only a comment": "expected keys and values, such as `steps: 100`, got an empty file",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(tmp_path, text):
    assert complaint(load, tmp_path, text) == f"{tmp_path}/x.yaml: {MISTAKES[text]}"


def test_a_value_of_another_type_is_refused_in_python_too():
    """By hand: `RunConfig(...)` here would be stopped by the tests' type checker before it gets there."""
    wrong = {
        "steps": ("100", "steps: expected a whole number, got '100'"),
        "batch_size": (True, "batch_size: expected a whole number, got True"),
        "holdout": (math.nan, "holdout: expected a number, got nan"),
        "schedule": ("linear", "schedule: expected one of cosine, wsd, constant, got 'linear'"),
        "hyper": (HyperParams(lr=torch.tensor(1.0)), "hyper.lr: expected a Python number, got tensor(1.)"),
        "model": ({"hidden_size": 8}, "model: expected a ModelConfig, got {'hidden_size': 8}"),
    }
    for key, (value, said) in [*wrong.items(), ("hyper", ({"lr": 1}, "hyper: expected a HyperParams, got {'lr': 1}"))]:
        config = replace(RunConfig())
        object.__setattr__(config, key, value)
        assert complaint(config.__post_init__) == said


def test_unreadable_files_are_one_line(tmp_path):
    assert complaint(load_settings, "no.yaml") == "no.yaml: expected a YAML file, got: No such file or directory"
    assert complaint(load_settings, str(tmp_path)).endswith("got: Is a directory")
    (tmp_path / "latin.yaml").write_bytes(b"prompt: \xff")
    latin = complaint(load_settings, str(tmp_path / "latin.yaml"))
    assert latin.endswith("latin.yaml: expected UTF-8 text, got byte 0xff at position 8; save it as UTF-8")
    for text in ("a: \x07", "[" * 400, "!!python/object/apply:os.getcwd []", "a: *b", "? [a]\n: 1"):
        complaint(load, tmp_path, text)


def test_an_unhashable_or_recursive_value_is_one_line(tmp_path):
    assert "an alias that holds itself" in complaint(load, tmp_path, "hyper: &h {lr: *h}")


def test_overrides_win_over_the_file_and_are_checked_like_it(tmp_path):
    config = load(tmp_path, "steps: 5\nseed: 3", {"steps": 7, "hyper.lr": 1})
    assert (config.steps, config.seed, config.hyper.lr) == (7, 3, 1.0)
    assert complaint(load_settings, None, {"hyper.lr": math.nan}) == "hyper.lr: expected a number, got nan"
    assert complaint(load_settings, None, {"hyper.lrr": 1}) == "hyper.lrr: unknown key, did you mean hyper.lr?"
    hidden = complaint(load, tmp_path, "steps: x", {"steps": 7})
    assert hidden == f"{tmp_path}/x.yaml: steps: expected a whole number, got 'x'"


# Command line


def test_no_arguments_mean_the_default_preset():
    assert parse_train_args([]) == (replace(RunConfig(), out="runs/train-seed0"), False)


@pytest.mark.parametrize("flag", ["--steps 10", "--steps=10"])
def test_both_ways_to_write_a_flag_mean_the_same(flag):
    assert parse(*flag.split()).steps == 10


def test_values_may_be_negative_exponential_empty_or_look_like_numbers():
    config = parse("--model.num-experts-per-tok", "-1", "--hyper.lr", "1e-3", "--prompt", "", "--data", "123")
    assert (config.model.num_experts_per_tok, config.hyper.lr, config.prompt, config.data) == (-1, 1e-3, "", "123")
    words = ["--hyper.surprise-sign", "-1e0", "--prompt=--x = 1", "--final-eval-bytes", "none", "--model.rope_theta=5"]
    config = parse(*words)
    assert (config.hyper.surprise_sign, config.prompt, config.final_eval_bytes) == (-1.0, "--x = 1", None)
    assert config.model.rope_theta == 5.0


WHOLE = [name for name in NUMBERS if type(HyperParams._field_defaults[name]) is int]
CHANGED_HYPER = dict.fromkeys(NUMBERS, 0.5) | dict.fromkeys(WHOLE, 8) | {"pi_alpha": 0.25, "surprise_sign": -1.0}


def test_every_setting_is_a_flag_of_its_dotted_name():
    changed = RunConfig(
        data="text.txt", out="somewhere", steps=9, seed=1, batch_size=3, sequence_length=8, schedule="constant",
        holdout=0.2, split="tail", eval_every=1, eval_bytes=7, final_eval_bytes=None, checkpoint_every=2,
        keep_checkpoints=5, picture_every=6, sample_tokens=4, prompt="x", threads=2,
        model=ModelConfig(
            300, 12, 2, 6, 3, 6, 5, 7, 3, 2, 6, 1e-5, 100.0, False, ngram_order=2, ngram_buckets=5,
            value_embeddings=True, token_bias=False, logit_softcap=3.0, zero_init=True, routing="hash",
            hash_key="pair", hash_weights="router", hash_layers="1", gate="sigmoid", shared_expert_intermediate_size=7,
        ),
        hyper=HyperParams(**CHANGED_HYPER), surprise_kind="input", precision="bfloat16", tokenizer="bpe",
        replay=0.5, init="weights", router_init="run", teacher="teacher", teacher_cache=True, compile=True,
        on_nonfinite="skip",
        shard_optimizer=True, shard_experts=3, device="cuda:1", accumulate=3, decay_share=0.25, stop_when=2,
        log="csv,wandb",
    )  # fmt: skip
    argv = []
    for key in KEYS:
        value = changed
        for name in key.split("."):
            value = getattr(value, name)
        default = RunConfig()
        for name in key.split("."):
            default = getattr(default, name)
        assert value != default or key in ("pack", "model.default_outputs"), (
            f"{key}: this test wants a value that is not the default"
        )
        argv += [f"--{key.replace('_', '-')}", str(value)]
    assert parse(*argv) == changed
    assert parse("--pack=true").pack, "which goes with no teacher"


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 5\nmodel: {num_experts: 8}\nhyper: {lr: 1}\n")
    words = ["--steps", "6", "--config", str(tmp_path / "mine.yaml"), "--hyper.lr=2", "--resume"]
    config, resume = parse_train_args(words)
    assert (config.steps, config.model.num_experts, config.hyper.lr, resume) == (6, 8, 2.0, True)


def test_a_run_without_a_folder_gets_one_named_after_preset_and_seed(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 4\n")
    assert parse("--config", str(tmp_path / "mine.yaml")).out == "runs/mine-seed4"
    assert parse("--seed", "9").out == "runs/train-seed9" == default_out(RunConfig(seed=9))
    assert parse("--out", "here").out == "here"


def test_resume_goes_on_with_the_settings_of_the_run_folder(tmp_path):
    saved = replace(RunConfig(), steps=11, out="moved away", hyper=HyperParams(lr=0.25))
    save_settings(saved, tmp_path / "config.yaml")
    config, resume = parse_train_args(["--out", str(tmp_path), "--resume", "--hyper.pi-alpha", "0.75"])
    assert resume
    assert config == replace(saved, out=str(tmp_path), hyper=HyperParams(lr=0.25, pi_alpha=0.75))
    fresh, resume = parse_train_args(["--out", str(tmp_path)])
    assert (fresh, resume) == (replace(RunConfig(), out=str(tmp_path)), False)


BAD_FLAGS = {
    "--model.hiden-size 4": "--model.hiden-size: unknown flag, did you mean --model.hidden-size?",
    "--surprise-kind bananas": "--surprise-kind: expected one of w2, unweighted, experts, input, benefit, oracle, got "
    "'bananas'",
    "--resum": "--resum: unknown flag, did you mean --resume?",
    "--resume=yes": "--resume: expected no value, got 'yes'",
    "--zzz": "--zzz: unknown flag; `tiny-onn train --help` lists them all",
    "steps 5": "steps: expected a flag, such as --steps 100",
    "-steps 5": "-steps: expected a flag, such as --steps 100",
    "--steps": "--steps: expected a value, got nothing",
    "--steps --seed 3": "--steps: expected a value, got --seed; if that is meant, write --steps=--seed",
    "--steps 1.5": "--steps: expected a whole number, got 1.5",
    "--steps -3": "--steps: expected 1 or more, got -3",
    "--hyper.lr fast": "--hyper.lr: expected a number, got 'fast'",
    "--hyper.lr nan": "--hyper.lr: expected a number, got 'nan'",
    "--hyper.lr .nan": "--hyper.lr: expected a number, got nan",
    "--hyper.pi-alpha 2": "--hyper.pi-alpha: expected more than 0 and at most 1, got 2.0",
    "--split thirds": "--split: expected one of auto, document, tail, got 'thirds'",
    "--model.hidden-size 0": "--model.hidden-size: expected 1 or more, got 0",
    "--model.num-experts 3": "--model.num-experts-per-tok: expected -1 (dynamic) or 1 to num_experts (3), got 4",
    "--config no.yaml": "no.yaml: expected a YAML file, got: No such file or directory",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_a_mistake_on_the_command_line_is_one_line_that_names_the_flag(words, capsys):
    assert complaint(parse_train_args, words.split()) == BAD_FLAGS[words]
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_reported_where_it_stands_in_the_file_or_on_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {num_experts: 3}\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--steps", "5"]
    place = f"{tmp_path}/mine.yaml: model.num_experts_per_tok: expected "
    assert complaint(parse_train_args, words).startswith(place)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert complaint(parse_train_args, [*words, "--steps", "-5"]) == "--steps: expected 1 or more, got -5"


def test_help_lists_every_flag_with_its_meaning_and_its_value_and_exits_with_0(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("steps: 12345\n")
    with pytest.raises(SystemExit) as stop:
        parse_train_args(["--config", str(tmp_path / "mine.yaml"), "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    flags = [f"--{key.replace('_', '-')} " for key in KEYS]
    assert [flag for flag in [*flags, "--config ", "--resume "] if flag not in page] == []
    assert "12345" in page
    assert "AdamW learning rate of the router; 0 freezes it." in page


def test_the_packages_import_without_pydantic_and_tyro():
    """Follow the imports that happen when a module is loaded; only those of a run's settings may lead to either."""
    waiting, reached = ["training.step.hyper_step", "tiny_onn_func", "training.storage.checkpoint"], set()
    while waiting:
        name = waiting.pop()
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in reached or not path.is_file():
            reached |= {name}
            continue
        reached |= {name}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    assert {"training.step.hyper_params", "torch"} <= reached
    assert {"pydantic", "tyro", "ruamel.yaml", "training.run.config"} & reached == set()


# Round trip

positive = st.floats(0, 1e30, exclude_min=True)
counts = st.integers(1, 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def model_values(draw) -> dict:
    groups, experts = draw(st.integers(1, 9)), draw(st.integers(1, 99))
    cap = draw(st.none() | st.integers(1, experts))
    floor = draw(st.integers(1, cap or experts))
    return {
        "vocab_size": draw(st.integers(257, 10**6)),
        "hidden_size": draw(st.integers(1, 10**6)),
        "num_hidden_layers": draw(st.integers(1, 10**6)),
        "num_attention_heads": groups * draw(st.integers(1, 9)),
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 99)),
        "moe_intermediate_size": draw(st.integers(1, 10**6)),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.just(-1) | st.integers(floor, cap or experts)),
        "min_experts_per_tok": floor,
        "max_experts_per_tok": cap,
        "rms_norm_eps": draw(positive),
        "rope_theta": draw(positive),
        "tie_word_embeddings": draw(st.booleans()),
        "routing": draw(st.sampled_from(("router", "token", "hash"))),
    }


@st.composite
def hyper_values(draw) -> dict:
    limits = {"pi_alpha": st.floats(0, 1, exclude_min=True), "surprise_sign": st.sampled_from([1.0, -1.0])}
    limits |= {key: st.floats(0, 1, exclude_max=True) for key in ("beta1", "beta2")}
    limits |= {key: st.floats(0, 1) for key in ("min_lr_ratio", "router_coupling", "explore_prob", "shuffle_targets")}
    limits |= {"quantile_balance": st.floats(0, 1), "table_memory": st.floats(0, 1, exclude_max=True)}
    limits |= {"kmeans_rate": st.floats(0, 1), "default_memory": st.floats(0, 1, exclude_max=True)}
    limits |= {"distill_alpha": st.sampled_from([0.0, 0.25, 1.0])}
    limits |= {"regenerate_below": st.floats(0, 1, exclude_max=True)}
    return {name: draw(limits.get(name, counts if name in WHOLE else positive)) for name in NUMBERS}


@st.composite
def run_values(draw) -> dict:
    whole = [key for key, hint in KEYS.items() if "." not in key and kinds_of(hint) == (int,)]
    surprise_kind = draw(st.sampled_from(KINDS))
    return {key: draw(counts) for key in whole} | {
        "data": draw(text.filter(bool)),
        "tokenizer": draw(st.just("bytes") | text.filter(bool)),
        "pack": draw(st.booleans()),
        "init": draw(st.none() | text.filter(bool)),
        "teacher_cache": draw(st.booleans()),
        "compile": draw(st.booleans()),
        "batch_size": 6 * draw(st.integers(1, 10**6)),
        "accumulate": 1 if surprise_kind == "oracle" else draw(st.sampled_from([1, 2, 3, 6])),
        "replay": draw(st.sampled_from([0.0, 0.25])),
        "out": draw(st.none() | text.filter(bool)),
        "sequence_length": draw(st.integers(2, 10**9)),
        "threads": draw(st.integers(0, 4096)),
        "schedule": draw(st.sampled_from(["cosine", "wsd", "constant"])),
        "decay_share": draw(st.floats(0, 1, exclude_min=True)),
        "holdout": draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        "surprise_kind": surprise_kind,
        "precision": draw(st.sampled_from(["float32", "bfloat16"])),
        "split": draw(st.sampled_from(["auto", "document", "tail"])),
        "final_eval_bytes": draw(st.none() | counts),
        "prompt": draw(text | st.sampled_from(["null", "none", "~", "1e-3", "on", "017", "true", ".nan", "<<", "- a"])),
    }


@given(run=run_values(), model=model_values(), hyper=hyper_values())
def test_config_to_yaml_to_config_is_the_identity(run, model, hyper, tmp_path_factory):
    taught = {"teacher": "folder", "pack": False} if hyper["distill_alpha"] else {}
    config = RunConfig(**run | taught, model=ModelConfig(**model), hyper=HyperParams(**hyper))
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_settings(config, path)
    assert load_settings(str(path)) == config
    assert [leftover.name for leftover in path.parent.glob("round_trip*")] == [path.name]


@given(value=st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False))
def test_a_flag_is_read_as_yaml_reads_the_same_scalar(value):
    read = scalar(yaml_text({"key": value}).removeprefix("key: ").removesuffix("\n"))
    assert (read, type(read)) == (value, type(value))


@given(words=text)
def test_no_text_of_a_flag_breaks_the_reader(words):
    assert isinstance(scalar(words), str | int | float | bool | None)


def test_a_run_from_before_the_tables_keeps_the_model_that_it_had(tmp_path: Path) -> None:
    values = plain_values(RunConfig(model=PLAIN_MODEL))
    values["model"] = {name: value for name, value in values["model"].items() if f"model.{name}" in FIRST}
    write_yaml(values, tmp_path / "config.yaml")
    assert load_settings(str(tmp_path / "config.yaml")).model == PLAIN_MODEL
    (tmp_path / "own.yaml").write_text("model: {hidden_size: 64}\n", encoding="utf-8")
    assert load_settings(str(tmp_path / "own.yaml")).model == replace(RunConfig().model, hidden_size=64)
