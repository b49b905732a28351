"""RunConfig: everything that decides a training run, as frozen values that are checked when they are made."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_type_hints

import torch

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.tree import flatten
from training.errors import UserError
from training.ranges import ABOVE_0_TO_1, BELOW_1, FROM_0, FROM_1, SEED, Range, out_of_range, ranges_of
from training.step.hyper_params import RANGES, HyperParams
from training.step.surprise import SurpriseKind
from training.storage.loggers import LOGGERS, NONE
from training.storage.typed import typed

BYTE_TOKENS = 257  # bytes 0 to 255 and the document boundary
Precision = Literal["auto", "float32", "bfloat16"]
TEXT = Range("some text", {"minLength": 1})
FROM_2 = Range("2 or more", {"minimum": 2})
BETWEEN_0_AND_1 = Range("more than 0 and less than 1", {"exclusiveMinimum": 0, "exclusiveMaximum": 1})
THREADS = Range("0 to 4,096", {"minimum": 0, "maximum": 4096})  # far more end the process
DEVICE = Range("auto, cpu, cuda, cuda:N or mps", {"pattern": r"^(auto|cpu|cuda(:\d{1,3})?|mps)$"})
ONE = "|".join(LOGGERS)
LOG = Range(
    f"{NONE}, or some of {', '.join(LOGGERS)} with commas between",
    {"pattern": rf"^(?!.*\b(\w+)\b.*\b\1\b)({NONE}|({ONE})( *, *({ONE}))*)$"},  # each only once
)
DERIVED = ("total_steps", "decay_steps")  # numbers of the hyper step that follow from the run


def _require(fine: bool, key: str, wanted: str, came: object, mend: str = "") -> None:
    if not fine:
        raise UserError(f"{key}: expected {wanted}, got {came!r}" + (f"; {mend}" if mend else ""))


# The model and the numbers of the default preset; presets/small.yaml says the same, a test compares them.
PLAIN_MODEL = ModelConfig(
    vocab_size=BYTE_TOKENS,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    moe_intermediate_size=64,
    num_experts=16,
    num_experts_per_tok=4,
)
DEFAULT_MODEL = replace(PLAIN_MODEL, routing="token", ngram_order=5, ngram_buckets=8192, token_bias=True)
DEFAULT_HYPER = HyperParams(lr=2e-3, warmup_steps=50, balance_weight=1.0)  # chosen in docs/lab-log.md


@dataclass(frozen=True)
class RunConfig:
    """One training run: the data, the budget, what is watched and written, the model, the numbers of the hyper step.

    Raises:
        UserError: a value is out of range; the message names the key.
    """

    data: Annotated[str, TEXT] = "stdlib"
    """What to train on: stdlib (the source of Python's standard library), stdlib:GLOB (a part of it), a text file, a
    folder, a glob, .jsonl, .parquet, .csv, .tsv, a WebDataset (.tar); .txt.gz and .jsonl.zst, too; a data set of the
    Hub (hf:OWNER/NAME[:SPLIT]); or several with weights (a.txt:0.7,b.jsonl:0.3)."""
    tokenizer: Annotated[str, TEXT] = "bytes"
    """Text -> tokens: bytes, a Hugging Face tokenizer.json, or a folder that holds one; byte-level ones only."""
    pack: bool = False
    """Whether attention keeps inside a document where several share a sequence, in training and in scores."""
    out: Annotated[str | None, TEXT] = None
    """Folder of the run; by default runs/<name of the config file, or train>-seed<seed>."""
    init: Annotated[str | None, TEXT] = None
    """Folder whose weights the run starts from: what `tiny-onn surgery` made, a Qwen3-MoE, or one of our own."""
    router_init: Annotated[str | None, TEXT] = None
    """Folder of a run, or of a model, whose router the run starts with; all else is as without. With hyper.router_lr 0
    it stays as it is."""
    teacher: Annotated[str | None, TEXT] = None
    """Folder of a Hugging Face causal language model to learn from, with hyper.distill_alpha."""
    teacher_cache: bool = False
    """Whether the teacher's logits are kept on disk for runs that see the same batches."""
    steps: Annotated[int, FROM_1] = 2300
    """Hyper steps of the whole run."""
    seed: Annotated[int, SEED] = 0
    """Seed of the parameters and of the order of the batches."""
    batch_size: Annotated[int, FROM_1] = 12
    """Sequences of a batch."""
    accumulate: Annotated[int, FROM_1] = 1
    """Equal parts of a batch that go through the model one after another: the same step in less memory."""
    sequence_length: Annotated[int, FROM_2] = 64
    """Tokens of a sequence."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rates after the warm-up: a cosine that ends at the last step, constant and then a linear decay that ends
    there (wsd: warm-up, stable, decay), or constant."""
    decay_share: Annotated[float, ABOVE_0_TO_1] = 0.2
    """Share of the steps over which wsd decays, more than 0 and at most 1; never steps of the warm-up."""
    holdout: Annotated[float, BETWEEN_0_AND_1] = 0.1
    """Share of the text that is held out, more than 0 and less than 1."""
    split: Literal["auto", "document", "tail"] = "auto"
    """What is held out: whole documents, the tail of the text, or (auto) documents where there are several on each
    side."""
    replay: Annotated[float, BELOW_1] = 0.0
    """Share of the rows of a batch that come from earlier tasks, in a study with `tasks`."""
    eval_every: Annotated[int, FROM_0] = 500
    """Steps between two held-out scores during the run; 0 scores only at the end."""
    eval_bytes: Annotated[int, FROM_1] = 16384
    """Held-out bytes of a score during the run."""
    stop_when: Annotated[int, FROM_0] = 0
    """Held-out scores in a row, during the run, that are no better than the best and end it; 0 is never."""
    final_eval_bytes: Annotated[int | None, FROM_1] = 262144
    """Held-out bytes of the score at the end; null means all of them."""
    checkpoint_every: Annotated[int, FROM_0] = 500
    """Steps between two checkpoints; 0 writes one at the end only."""
    keep_checkpoints: Annotated[int, FROM_1] = 2
    """Newest checkpoints that are kept; that of the best held-out score stays, too."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss, gradient, surprise or new state is NaN or infinite: stop the run, or be skipped."""
    picture_every: Annotated[int, FROM_0] = 500
    """Steps between two updates of the pictures; 0 draws them at the end only."""
    sample_tokens: Annotated[int, FROM_0] = 200
    """Tokens of the sample text at the end; 0 for no sample."""
    prompt: str | None = None
    """What the sample text continues; by default what fits the data: a user's turn for chats, "def " for stdlib, else
    the beginning of a document."""
    log: Annotated[str | None, LOG] = "tensorboard"
    """Loggers of the records, beside metrics.jsonl: tensorboard, csv, trackio, wandb with commas between, or none."""
    threads: Annotated[int, THREADS] = 0
    """Processor threads; 0 leaves the choice to torch."""
    device: Annotated[str, DEVICE] = "auto"
    """Where it is computed: auto (an accelerator where there is one), cpu, cuda, cuda:N or mps."""
    precision: Precision = "auto"
    """What the model computes in: auto is bfloat16 on CUDA devices that have it, else float32. Parameters, moments,
    router and surprise are float32 in any case."""
    compile: bool = False
    """Whether the step is compiled: minutes once, then faster steps. Wants a C++ compiler."""
    shard_optimizer: bool = False
    """Whether each of several processes (torchrun) keeps the optimizer's state of its share of the parameters only."""
    shard_experts: Annotated[int, FROM_1] = 1
    """Processes over which the experts of a layer are spread; divides both their number and the processes'."""
    surprise_kind: SurpriseKind = "w2"
    """What surprise is: w2, unweighted, experts, input or benefit, as training/step/surprise.py explains."""
    model: ModelConfig = DEFAULT_MODEL
    """Sizes of the model."""
    hyper: HyperParams = DEFAULT_HYPER
    """Numbers of the hyper step. A run's defaults are not those of `HyperParams()`, which is the plain step: a run has
    lr 2e-3 (there 3e-3), a warm-up of 50 steps (there none), balance_weight 1.0 (there 0), and a cosine to its last
    step (there a constant rate). `tiny-onn train --help` shows a run's."""

    def __post_init__(self) -> None:
        for key, kind in (("model", ModelConfig), ("hyper", HyperParams)):
            _require(isinstance(getattr(self, key), kind), key, f"a {kind.__name__}", getattr(self, key))
        numbers = {f"hyper.{name}": value for name, value in self.hyper._asdict().items()}
        for key, value in (vars(self) | numbers).items():
            if key in KEYS:  # the model checks its sizes itself
                _require(not isinstance(value, torch.Tensor), key, "a Python number", value)
                typed(KEYS[key], value, key)
        if wrong := out_of_range(self, RUN_RANGES):
            raise UserError(wrong)
        if wrong := out_of_range(self.hyper, RANGES):
            raise UserError(f"hyper.{wrong}")
        for name in DERIVED:
            came = getattr(self.hyper, name)
            _require(came == 0, f"hyper.{name}", "0, as it follows from steps and schedule", came)
        wanted, parts = f"a divisor of batch_size ({self.batch_size})", self.accumulate
        _require(self.batch_size % parts == 0, "accumulate", wanted, parts, "change one of them")
        wanted = "1 with surprise_kind oracle, which samples the whole batch"
        _require(parts == 1 or self.surprise_kind != "oracle", "accumulate", wanted, parts, "leave it away")
        wanted, patience = f"0 with eval_every {self.eval_every}, which scores at the end only", self.stop_when
        _require(not patience or self.eval_every > 0, "stop_when", wanted, patience, "set eval_every, or leave it away")
        alpha, teacher = float(self.hyper.distill_alpha), self.teacher
        _require(not alpha or teacher is not None, "teacher", f"a folder, as hyper.distill_alpha is {alpha}", teacher)
        _require(teacher is None or alpha > 0, "hyper.distill_alpha", "more than 0 with a teacher", alpha)
        _require(not (self.teacher and self.pack), "pack", "False with a teacher, which sees the whole row", self.pack)
        follows = self.model.routing == "thresholds" and float(self.hyper.quantile_balance) > 0
        wanted = "more than 0 with routing: thresholds and hyper.quantile_balance"
        _require(not follows or float(self.hyper.quantile_k) > 0, "hyper.quantile_k", wanted, self.hyper.quantile_k)
        parts, wanted = self.shard_experts, "1 with model.default_outputs, whose means are of all experts"
        _require(parts == 1 or not self.model.default_outputs, "shard_experts", wanted, parts)
        if self.tokenizer == "bytes":  # another one is a file, and asked when the run begins
            wanted = f"{BYTE_TOKENS} (256 bytes and the document boundary) or more"
            _require(self.model.vocab_size >= BYTE_TOKENS, "model.vocab_size", wanted, self.model.vocab_size)


def _keys() -> dict[str, Any]:
    hints = get_type_hints(RunConfig, include_extras=True)
    numbers = {name: type(default) for name, default in HyperParams._field_defaults.items() if name not in DERIVED}
    sections = {
        "model": get_type_hints(ModelConfig),
        "hyper": {name: Annotated[kind, RANGES[name]] for name, kind in numbers.items()},
    }
    return flatten(hints | sections)


KEYS = _keys()  # dotted key -> type and range of every setting, in the order of RunConfig
RUN_RANGES = ranges_of(RunConfig)


def plain_values(config: RunConfig) -> dict[str, Any]:
    """Every setting, nested as in YAML."""
    numbers = {name: value for name, value in config.hyper._asdict().items() if name not in DERIVED}
    return asdict(config) | {"hyper": numbers}


def hyper_params(config: RunConfig) -> HyperParams:
    """HyperParams of the run, all Python numbers.

    The decay ends at the last step of the run: `total_steps = steps`, or 0 (constant) with `schedule: constant`.
    A run shorter than its warm-up warms up until its end: `warmup_steps` is at most `steps`. With `schedule: wsd` the
    decay has the share `decay_share` of the steps, at least one.
    """
    return config.hyper._replace(
        total_steps=0 if config.schedule == "constant" else config.steps,
        decay_steps=max(1, round(config.decay_share * config.steps)) if config.schedule == "wsd" else 0,
        warmup_steps=min(int(config.hyper.warmup_steps), config.steps),
    )


def statics(config: RunConfig) -> dict[str, Any]:
    """Arguments of `hyper_step` beside numbers: choices that decide which program runs."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else None
    return {"kind": config.surprise_kind, "compute_dtype": dtype}


def default_out(config: RunConfig, preset: str = "train") -> str:
    """The run folder of a config that names none: runs/<preset>-seed<seed>."""
    return f"runs/{preset}-seed{config.seed}"
