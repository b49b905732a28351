"""Suggestions for an unknown name: the field's other words for a setting, absent settings, and typos of all."""

from collections.abc import Callable, Collection
from difflib import SequenceMatcher

# Last part of a name, as other programs call it -> the setting. The words are those of Hugging Face, nanoGPT, Megatron.
SYNONYMS: dict[str, str] = {
    other: key
    for key, others in {
        "hyper.lr": "learning_rate lrate eta max_lr peak_lr base_lr",
        "hyper.router_lr": "router_learning_rate gate_lr",
        "hyper.min_lr_ratio": "min_lr min_learning_rate lr_min",
        "hyper.warmup_steps": "warmup warmup_iters warmup_ratio warmup_fraction num_warmup_steps lr_warmup_iters",
        "hyper.weight_decay": "wd decay",
        "hyper.beta1": "adam_beta1 betas momentum",
        "hyper.beta2": "adam_beta2",
        "hyper.eps": "adam_epsilon epsilon",
        "hyper.max_grad_norm": "grad_clip clip_grad gradient_clip gradient_clipping max_norm clip",
        "hyper.balance_weight": "aux_loss_coef router_aux_loss_coef aux_loss load_balance balance",
        "hyper.z_weight": "z_loss router_z_loss router_z_loss_coef z_loss_weight",
        "hyper.pi_alpha": "surprise_budget budget alpha",
        "hyper.bias_speed": "bias_update_speed",
        "hyper.explore_prob": "exploration epsilon_greedy",
        "steps": "max_steps num_steps total_steps train_steps train_iters max_iters iterations iters epochs "
        "num_epochs num_train_epochs",
        "batch_size": "bs batch micro_batch_size global_batch_size train_batch_size per_device_train_batch_size",
        "accumulate": "gradient_accumulation_steps grad_accum accum_steps accumulation_steps accumulate_grad_batches",
        "sequence_length": "seq_len seq_length seqlen block_size context context_length max_seq_len max_length "
        "max_seq_length",
        "seed": "random_seed rng_seed",
        "data": "dataset dataset_path train_file data_path corpus input",
        "out": "output_dir out_dir output outdir save_dir run_dir logdir log_dir",
        "init": "init_from model_name_or_path pretrained checkpoint load from_pretrained",
        "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style",
        "decay_share": "decay_fraction cooldown cooldown_fraction lr_decay_iters num_decay_steps decay_steps",
        "holdout": "val_split val_fraction validation_split test_size val_ratio",
        "eval_every": "eval_interval eval_steps val_interval evaluate_every",
        "stop_when": "early_stopping early_stopping_patience patience early_stop",
        "checkpoint_every": "save_every save_steps save_interval checkpoint_interval ckpt_every",
        "keep_checkpoints": "save_total_limit max_checkpoints",
        "precision": "dtype bf16 fp16 amp mixed_precision",
        "threads": "num_threads num_workers workers cpus",
        "compile": "torch_compile",
        "prompt": "sample_prompt start",
        "model.hidden_size": "n_embd d_model dim embed_dim width hidden_dim emb_dim",
        "model.num_hidden_layers": "n_layer n_layers num_layers layers depth",
        "model.num_attention_heads": "n_head n_heads num_heads heads",
        "model.num_key_value_heads": "n_kv_head kv_heads num_kv_heads num_query_groups",
        "model.moe_intermediate_size": "intermediate_size d_ff ffn_dim ffn_hidden_size mlp_dim expert_size",
        "model.num_experts": "experts n_experts num_local_experts n_routed_experts",
        "model.num_experts_per_tok": "top_k topk k experts_per_token num_experts_per_token moe_router_topk",
        "model.vocab_size": "vocab n_vocab",
        "model.rope_theta": "rope_base rotary_base",
    }.items()
    for other in others.split()
}
ABSENT: dict[str, str] = {  # what there is none of -> why, or what to use
    "dropout": "the model has no dropout; hyper.weight_decay regularises it",
    "label_smoothing": "the loss is the plain cross entropy",
    "optimizer": "it is AdamW, whose numbers are hyper.lr, hyper.beta1, hyper.beta2 and hyper.weight_decay",
    "optim": "it is AdamW, whose numbers are hyper.lr, hyper.beta1, hyper.beta2 and hyper.weight_decay",
    "wandb": "`log: wandb` sends the records there; the run folder has metrics.jsonl",
    "wandb_project": "`log: wandb` sends the records to the project $WANDB_PROJECT",
    "report_to": "`log` names the loggers: tensorboard, csv, trackio, wandb",
    "bias": "as in Qwen3, no linear map has one",
}
FLAGS: dict[str, tuple[str, ...]] = {  # of the other verbs; the first one that a verb has is meant
    "max_new_tokens": ("tokens",),
    "max_tokens": ("tokens",),
    "max_length": ("tokens",),
    "length": ("tokens",),
    "num_tokens": ("tokens",),
    "n": ("num_samples", "step"),
    "num_return_sequences": ("num_samples",),
    "samples": ("num_samples",),
    "text": ("prompt", "data"),
    "temp": ("temperature",),
    "top_k": ("num_experts_per_tok",),
    "k": ("top_k", "num_experts_per_tok"),
    "experts": ("num_experts", "show_experts"),
    "dataset": ("data",),
    "output": ("out",),
    "output_dir": ("out",),
    "max_bytes": ("bytes",),
    "vocab": ("vocab_size",),
    "overwrite": ("force",),
    "f": ("force",),
}
UNITS: dict[str, str] = {  # words that count otherwise than the setting that they lead to -> how it counts
    "warmup_ratio": "in steps, not a share of them",
    "warmup_fraction": "in steps, not a share of them",
    "epochs": "in batches, not passes over the text",
    "num_epochs": "in batches, not passes over the text",
    "num_train_epochs": "in batches, not passes over the text",
    "min_lr": "a share of the peak",
    "min_learning_rate": "a share of the peak",
    "lr_min": "a share of the peak",
    "lr_decay_iters": "a share of the steps",
    "num_decay_steps": "a share of the steps",
    "decay_steps": "a share of the steps",
}
VERBS = {
    "eval": "evaluate",
    "score": "evaluate",
    "sample": "generate",
    "test": "evaluate",
    "fit": "train",
    "run": "train",
}

SIMILAR = 0.72  # ratio of equal letters in order, from which on a word passes for a typo of another
MOST_SHORT = 1  # letters of words that nothing is a typo of


def suggestion(name: str, known: Collection[str]) -> str | None:
    """Known name that an unknown one most likely means; None if no name is near.

    Dotted names are compared by their last part: `lr` and `hyper.learning_rate` both mean `hyper.lr`. Without an equal
    word the nearest one counts, so that `lerning_rate` does, too.
    """
    words = _words(known)
    word = _nearest(_last(name), words)
    return None if word is None else words[word]


def advice(name: str, known: Collection[str], otherwise: str, spell: Callable[[str], str] = str) -> str:
    """End of a message about an unknown name: the suggestion, the reason that there is none, or `otherwise`.

    Args:
        spell: writes a known name as the user would: a key, or a flag.
    """
    words = _words(known)
    word = _nearest(_last(name), [*words, *ABSENT])
    if word is None:
        return otherwise
    if word in ABSENT:
        return f"; there is none: {ABSENT[word]}"
    return f", did you mean {spell(words[word])}?" + (f" It is {UNITS[word]}" if word in UNITS else "")


def _words(known: Collection[str]) -> dict[str, str]:
    """Map words to the known names that they mean: last parts of these names first, then what others call them."""
    words: dict[str, str] = {}
    for key in known:
        words.setdefault(_last(key), key)
    others = [*FLAGS.items(), *((word, (key,)) for word, key in (SYNONYMS | VERBS).items())]
    for word, keys in others:
        for key in keys:
            if key in known:
                words.setdefault(word, key)
    return words


def _nearest(word: str, words: Collection[str]) -> str | None:
    """The word itself, or the most similar one, of equally similar ones the first; None if none is similar."""
    if word in words:
        return word
    similar = {other: SequenceMatcher(None, word, other).ratio() for other in words if len(other) > MOST_SHORT}
    best = max(similar, key=similar.__getitem__, default=None)
    return None if best is None or similar[best] < SIMILAR else best


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("-", "_")
