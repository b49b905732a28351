"""Every size of the model, in one place, checked when it is made."""

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

RoutingRule = Literal["router", "token", "hash", "thresholds", "stable", "kmeans"]
ROUTING_RULES: tuple[RoutingRule, ...] = ("router", "token", "hash", "thresholds", "stable", "kmeans")
MAX_NGRAM = 8  # tokens of an n-gram
MAX_BUCKETS = 1 << 31  # rows of a table of n-grams: its hash has 32 bits
HashKey = Literal["token", "previous", "pair", "position", "table"]
HASH_KEYS: tuple[HashKey, ...] = ("token", "previous", "pair", "position", "table")
HashWeights = Literal["hash", "router"]
HASH_WEIGHTS: tuple[HashWeights, ...] = ("hash", "router")
ALL_LAYERS = "all"
Gate = Literal["softmax", "sigmoid"]
GATES: tuple[Gate, ...] = ("softmax", "sigmoid")
DYNAMIC_K = -1  # value of num_experts_per_tok that hands the choice of K to the surprise budget


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Tiny-ONN decoder, under their Hugging Face names.

    Raises:
        ValueError: a size is no whole number, out of range or does not divide; the message names the key.
    """

    vocab_size: int
    """Tokens in the vocabulary (V)."""
    hidden_size: int
    """Width of the residual stream (D)."""
    num_hidden_layers: int
    """Decoder layers (L)."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; divides the query heads (grouped-query attention)."""
    head_dim: int
    """Width of a head; even, for the rotary embedding."""
    moe_intermediate_size: int
    """Hidden size of one expert (F)."""
    num_experts: int
    """Experts per layer (E)."""
    num_experts_per_tok: int = DYNAMIC_K
    """Experts of a token (K); -1 lets the surprise budget choose per token."""
    min_experts_per_tok: int = 1
    """Floor under the budget's choice; a fixed K is not below it."""
    max_experts_per_tok: int | None = None
    """Static cap (M) over the budget's choice, a fixed K is not above it; None means all experts."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool = True
    """Whether the head is the transposed embedding."""
    ngram_order: int = 1
    """Longest n-gram whose hashed embedding is added to the token's; 1 is the token alone."""
    ngram_buckets: int = 4096
    """Rows of the embedding table of each order from 2 to ngram_order."""
    value_embeddings: bool = False
    """Whether each layer adds a vector of the token's own to the values of its attention."""
    token_bias: bool = False
    """Whether each layer adds a vector of the token's own to the residual stream."""
    logit_softcap: float = 0.0
    """Bound c of the logits, which become c * tanh(logits / c); 0 is none."""
    zero_init: bool = False
    """Whether what writes into the residual stream, o_proj and w2, begins at zero."""
    routing: RoutingRule = "router"
    """`router` asks the router for a ranking; `token` lets it see the token's embedding alone, so that a token visits
    the same experts wherever it stands; `hash` takes a fixed hash of token id and layer instead; `thresholds` takes
    every expert whose logit is above its learned threshold (the selection bias, negated); `stable` counts the router's
    choices in a table by token, which chooses from `hyper.table_step` on, while the router weighs (StableMoE); `kmeans`
    has the mean inputs of each expert, learned without a gradient, in place of a router, and asks for the cosine."""
    hash_key: HashKey = "token"
    """With `routing: hash`, the key that is hashed: `token`, the token's id; `previous`, the id of the token before it;
    `pair`, both; `position`, the token's place in its document. `table` takes scores of experts from a fixed table by
    token, which a run fills so that the experts get even shares of the training text, instead of hashing."""
    hash_weights: HashWeights = "hash"
    """With `routing: hash`, the weights of the experts that the hash chose: `hash`, fixed ones from its own numbers;
    `router`, the softmax of the router's logits over them, which learn."""
    hash_layers: str = ALL_LAYERS
    """With `routing: hash`, the layers that it routes: `all`, or numbers from 0 with commas between (`0,1`); the other
    layers ask the router."""
    gate: Gate = "softmax"
    """Score of an expert, from its logit: `softmax` over all experts, or `sigmoid` of its own, normalised over the
    chosen experts to make weights (DeepSeek-V3, arXiv 2412.19437)."""
    shared_expert_intermediate_size: int = 0
    """Hidden size of an expert that every token visits beside those that are routed, with weight 1; 0 is none."""
    default_outputs: bool = False
    """Whether the running mean of an expert's outputs stands in for it on tokens that do not visit it (Default MoE);
    weights are then the scores of all experts, not normalised over the chosen ones."""

    def __post_init__(self) -> None:
        sizes, bounds = fields(self)[:8], ("num_experts_per_tok", "min_experts_per_tok", "max_experts_per_tok")
        for name in (*(field.name for field in sizes), *bounds):
            came = getattr(self, name)
            whole = isinstance(came, int) and not isinstance(came, bool)
            _require(whole or (came is None and name == bounds[2]), name, "a whole number", repr(came))
        for field in sizes:
            _require(getattr(self, field.name) >= 1, field.name, "1 or more", getattr(self, field.name))
        heads, groups, experts = self.num_attention_heads, self.num_key_value_heads, self.num_experts
        _require(heads % groups == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})", groups)
        _require(self.head_dim % 2 == 0, "head_dim", "an even number (rotary pairs)", self.head_dim)
        top_k = self.num_experts_per_tok
        wanted = f"{DYNAMIC_K} (dynamic) or 1 to num_experts ({experts})"
        _require(top_k == DYNAMIC_K or 1 <= top_k <= experts, "num_experts_per_tok", wanted, top_k)
        cap = self.max_experts_per_tok
        _require(cap is None or 1 <= cap <= experts, "max_experts_per_tok", f"1 to num_experts ({experts})", cap)
        floor, ceiling = self.min_experts_per_tok, experts if cap is None else cap
        wanted = f"1 to max_experts_per_tok ({ceiling})"
        _require(1 <= floor <= ceiling, "min_experts_per_tok", wanted, floor)
        wanted = f"{DYNAMIC_K} (dynamic) or min_experts_per_tok ({floor}) to max_experts_per_tok ({ceiling})"
        _require(top_k == DYNAMIC_K or floor <= top_k <= ceiling, "num_experts_per_tok", wanted, f"{top_k}; change one")
        _require(self.routing in ROUTING_RULES, "routing", " or ".join(ROUTING_RULES), self.routing)
        for name, known in (("hash_key", HASH_KEYS), ("hash_weights", HASH_WEIGHTS), ("gate", GATES)):
            _require(getattr(self, name) in known, name, " or ".join(known), getattr(self, name))
        wanted, named = f"{ALL_LAYERS}, or numbers below {self.num_hidden_layers} with commas between", self.hash_layers
        fits = isinstance(named, str) and (named == ALL_LAYERS or _layers_of(named, self.num_hidden_layers) is not None)
        _require(fits, "hash_layers", wanted, repr(named))
        for name, plain in (("hash_key", "token"), ("hash_weights", "hash"), ("hash_layers", ALL_LAYERS)):
            fits = self.routing == "hash" or getattr(self, name) == plain
            _require(fits, name, f"{plain} without routing: hash", getattr(self, name))
        fits = self.gate == "softmax" or self.routing != "thresholds"
        _require(fits, "gate", "softmax with routing: thresholds, whose gates are open or shut", self.gate)
        wanted = "False with routing: thresholds, whose gates are open or shut"
        _require(not self.default_outputs or self.routing != "thresholds", "default_outputs", wanted, True)
        came = self.shared_expert_intermediate_size
        whole = isinstance(came, int) and not isinstance(came, bool) and came >= 0
        _require(whole, "shared_expert_intermediate_size", "a whole number, 0 or more", repr(came))
        dynamic = self.routing != "thresholds" or top_k == DYNAMIC_K
        _require(dynamic, "num_experts_per_tok", f"{DYNAMIC_K} (dynamic) with routing: thresholds", top_k)
        for name, most in (("ngram_order", MAX_NGRAM), ("ngram_buckets", MAX_BUCKETS)):
            came = getattr(self, name)
            whole = isinstance(came, int) and not isinstance(came, bool)
            _require(whole and 1 <= came <= most, name, f"a whole number, 1 to {most}", repr(came))
        for name in ("tie_word_embeddings", "default_outputs", "value_embeddings", "token_bias", "zero_init"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", repr(getattr(self, name)))
        for name in ("rms_norm_eps", "rope_theta", "logit_softcap"):
            came, may_be_off = getattr(self, name), name == "logit_softcap"
            number = isinstance(came, int | float) and not isinstance(came, bool)
            wanted = "a finite number, 0 or more" if may_be_off else "a finite number, more than 0"
            _require(number and (came > 0 or (came == 0 and may_be_off)) and came < math.inf, name, wanted, came)

    @property
    def routes_per_token(self) -> int:
        """Largest number of experts that one token may visit (M): the static number of slots."""
        if self.num_experts_per_tok != DYNAMIC_K:
            return self.num_experts_per_tok
        return self.num_experts if self.max_experts_per_tok is None else self.max_experts_per_tok

    def is_hashed(self, layer: int) -> bool:
        """True if a hash chooses the experts of a layer."""
        named = self.hash_layers
        return self.routing == "hash" and (
            named == ALL_LAYERS or layer in (_layers_of(named, self.num_hidden_layers) or ())
        )

    @property
    def has_table(self) -> bool:
        """True if experts are looked up in a table by token, now or later."""
        return self.routing == "stable" or (self.routing == "hash" and self.hash_key == "table")

    def has_router(self, layer: int) -> bool:
        """True if a layer's logits come from its router: it chooses, or it weighs what a hash chose."""
        return not self.is_hashed(layer) or self.hash_weights == "router"

    def learns(self, layer: int) -> bool:
        """True if a layer's router follows a gradient."""
        return self.has_router(layer) and self.routing != "kmeans"


@cache
def _layers_of(named: str, count: int) -> frozenset[int] | None:
    """The layers that a list of numbers names; None if it names none, or one that there is not, or one twice."""
    parts = [part.strip() for part in named.split(",")]
    numbers = [int(part) if part.isascii() and part.isdigit() and len(part) < 10 else count for part in parts]
    return frozenset(numbers) if len({*numbers}) == len(numbers) and max(numbers) < count else None


def _require(fine: bool, key: str, wanted: str, came: object) -> None:
    if not fine:
        raise ValueError(f"model.{key}: expected {wanted}, got {came}")
