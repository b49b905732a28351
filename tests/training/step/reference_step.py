"""Reference of one hyper step in plain loops and float64, written from the definitions alone.

Sources: DESIGN.md, docstrings of the public names, README and docs/. Where none of them gives a definition, a comment
`Taken:` names the one that was taken. Autograd differentiates the main loss alone; surprise is its gradient in copies
of the weights that belong to a single row.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tiny_onn_func.tree import flatten, tree_map

MASK = 2**32 - 1
TIE = 2.0**-17
EXPLORE, SHUFFLE, REGENERATE, ORACLE = 0, 1, 2, 3  # streams of random words
MATRICES = (
    "embed_tokens",
    "lm_head",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "w1",
    "w3",
    "w2",
    "shared_w1",
    "shared_w3",
    "shared_w2",
)
TABLES = ("ngram_embed", "value_embed", "token_bias")  # of vectors that are looked up
ZERO = torch.zeros((), dtype=torch.float64)


class Route(NamedTuple):
    """A (layer, token, expert) with its routing weight, private leaves (w1, w3, w2, input) and output y."""

    layer: int
    token: int
    expert: int
    weight: Tensor
    leaves: tuple[Tensor, ...]
    y: Tensor


class Trace(NamedTuple):
    """Logits of each token, the routes, and by (layer, token) the router's input, its logits, and those that route."""

    logits: list[Tensor]
    routes: list[Route]
    inputs: dict[tuple[int, int], Tensor]
    learned: dict[tuple[int, int], Tensor]
    routing: dict[tuple[int, int], Tensor]


class Result(NamedTuple):
    """Parameters and moments by name, metrics, surprise by (layer, token, expert), and the closest decision."""

    params: dict[str, Tensor]
    expert_moments: tuple[dict[str, Tensor], dict[str, Tensor]]
    router_moments: tuple[dict[str, Tensor], dict[str, Tensor]]
    metrics: dict[str, object]
    surprise: dict[tuple[int, int, int], float]
    margin: float


class Margins(list[float]):
    """Relative distances of discrete decisions from their alternatives; float32 may decide the closest otherwise."""

    def compare(self, chosen: float, other: float, scale: float = 0.0) -> None:
        scale = max(abs(chosen), abs(other), scale)
        if chosen != other:  # equal values are ties by structure, which every precision shares
            self.append(abs(chosen - other) / scale)


def mix(x: int) -> int:
    """Finalise 32 bits with the constants of murmur3 (tiny_onn_func/hashing.py)."""
    x &= MASK
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def word(seed: int, step: int, stream: int, position: int) -> int:
    """Random word of 32 bits, a hash of its four arguments (training/draws.py)."""
    key = mix(mix(seed) + step)
    key = key if stream == EXPLORE else mix(key + stream)
    return mix(mix(position) + key)


def explored(hyper, step: int, layer: int, token: int, shape: tuple[int, int, int]) -> int:
    """Expert that the token also tries in the layer, -1 for none (training/draws.py)."""
    layers, tokens, experts = shape
    place = layer * tokens + token
    chance = word(int(hyper.explore_seed), step, EXPLORE, place) / 2**32
    choice = word(int(hyper.explore_seed), step, EXPLORE, layers * tokens + place)
    return choice * experts >> 32 if chance < hyper.explore_prob else -1


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


@functools.cache
def turn(position: int, half: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles. Taken: in float32 whatever the dtype, as `transformers` computes them."""
    angle = position * (1 / theta ** (torch.arange(half, dtype=torch.float32) / half))
    return angle.cos().double(), angle.sin().double()


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + half) of a head by position / theta^(i / half)."""
    half = x.shape[0] // 2
    cos, sin = turn(position, half, theta)
    a, b = x[:half], x[half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin))


def ngrams(table: Tensor, ids: list[int], numbers: list[int], place: int, config) -> Tensor:
    """Sum of the rows of the n-grams that end at a place of a row, n = 2 ... ngram_order (embedding.py)."""
    key, total = mix(ids[place]), ZERO
    for back in range(1, config.ngram_order):
        inside = place >= back and numbers[place - back] == numbers[place]
        token = ids[place - back] if inside else -1
        key = mix(key + mix(token + back * config.vocab_size + 1))
        total = total + table[back - 1, key % config.ngram_buckets]
    return total


def attention(weights: dict[str, Tensor], x: list[Tensor], ids: list[int], numbers: list[int], config) -> list[Tensor]:
    """Causal grouped-query attention of one row: a token sees earlier tokens, and itself, of its own number."""
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def heads(vector: Tensor, position: int, name: str) -> list[Tensor]:
        parts = [rms_norm(p, weights[f"{name}_norm"], config.rms_norm_eps) for p in vector.split(size)]
        return [rotate(p, position, config.rope_theta) for p in parts]

    real = [i for i, number in enumerate(numbers) if number != 0]
    queries = {i: heads(x[i] @ weights["q_proj"], i, "q") for i in real}
    keys = {i: heads(x[i] @ weights["k_proj"], i, "k") for i in real}
    own = [weights["value_embed"][i] if config.value_embeddings else ZERO for i in ids]
    values = {i: (x[i] @ weights["v_proj"] + own[i]).split(size) for i in real}
    outputs = [torch.zeros_like(vector) for vector in x]  # padding has no target and is never seen: any value will do
    for i in real:
        visible = [j for j in range(i + 1) if numbers[j] == numbers[i]]
        mixed = []
        for head, query in enumerate(queries[i]):
            of = head // group
            share = (torch.stack([keys[j][of] for j in visible]) @ query / math.sqrt(size)).softmax(0)
            mixed.append(share @ torch.stack([values[j][of] for j in visible]))
        outputs[i] = torch.cat(mixed) @ weights["o_proj"]
    return outputs


def choose(logits: Tensor, bias: Tensor, budget: float, explore: int, config, margins: Margins) -> list[int]:
    """Experts of one real token, best first; ties by logit, then by place (DESIGN 5, "One wall")."""
    most = config.max_experts_per_tok or config.num_experts
    p, thresholds = logits.softmax(0).tolist(), config.routing == "thresholds"
    scores = (
        logits.softmax(0) if config.gate == "softmax" else logits.exp()
    )  # of a sigmoid the logits are the logarithm
    # Taken: the bias is added to the probability (arXiv 2408.15664), to the logit where it is a negated threshold
    score = (logits + bias if thresholds else scores + bias).tolist()
    order = sorted(range(len(p)), key=lambda e: (-score[e], -float(logits[e]), e))
    if config.num_experts_per_tok > 0:
        count = most = config.num_experts_per_tok
    elif thresholds:
        count = sum(s > 0 for s in score)
        margins.extend(abs(s) for s in score)
    else:  # Taken: with a bias, the mass of the probabilities in the order of the scores
        mass = [math.fsum(p[e] for e in order[:rank]) for rank in range(len(p))]
        count = sum(before < budget for before in mass)
        margins.extend(abs(before - budget) for before in mass)
    if config.num_experts_per_tok < 0:
        count = min(max(count, config.min_experts_per_tok), most)
    kept = order[:count]
    if explore >= 0 and explore not in kept:
        # Taken: one expert more where there is room, else in the place of the last one
        kept = [*order[: min(count, most - 1)], explore]
    for rank in {count, most - 1} - {0, len(p)}:
        margins.compare(score[order[rank - 1]], score[order[rank]])
    return kept


def routing_weights(logits: Tensor, bias: Tensor, kept: list[int], coupling: float, config) -> Tensor:
    """Probabilities renormalised over the kept experts; a share `coupling` of their gradient is let through."""
    if config.routing == "thresholds":  # Taken: uniform, with the gradient of a sigmoid gate straight through (DynMoE)
        gate = torch.sigmoid((logits + bias)[kept])
        weights = (1 + gate - gate.detach()) / len(kept)
    else:
        weights = logits.softmax(0)[kept] / logits.softmax(0)[kept].sum()
    return coupling * weights + (1 - coupling) * weights.detach()


def hashes(config, layer: int) -> bool:
    """The layer is one that a hash routes."""
    named = range(config.num_hidden_layers) if config.hash_layers == "all" else map(int, config.hash_layers.split(","))
    return config.routing == "hash" and layer in named


def learns(config, layer: int) -> bool:
    """The layer's logits come from its router."""
    return config.routing != "kmeans" and (not hashes(config, layer) or config.hash_weights == "router")


def hash_key(kind: str, row: range, t: int, ids: list[int], numbers: list[int]) -> int:
    """The number that is hashed for token t of a row; a document begins where the number changes."""
    start = t
    while start > row[0] and numbers[start - 1] == numbers[t]:
        start -= 1
    previous = ids[t - 1] if t > start else -1
    return {
        "token": ids[t], "table": ids[t], "previous": previous, "position": t - start, "pair": mix(previous) + ids[t],
    }[kind]  # fmt: skip


def visit(layer: int, token: int, expert: int, weight: Tensor, x: Tensor, moe: dict[str, Tensor]) -> Route:
    """Apply a SwiGLU expert with weights, and an input, that are this row's own."""
    w1, w3, w2, own = (leaf + 0.0 for leaf in (moe["w1"][expert], moe["w3"][expert], moe["w2"][expert], x))
    gate = own @ w1
    hidden = gate * torch.sigmoid(gate) * (own @ w3)
    return Route(layer, token, expert, weight, (w1, w3, w2, own), hidden @ w2)


def forward(params, batch, hyper, step: int, config, margins: Margins, rows=None, override=None) -> Trace:
    """Decode token by token the given rows, or all; `override` sends {(layer, token): expert} to that expert alone."""
    B, S = batch.input_ids.shape
    shape = (config.num_hidden_layers, B * S, config.num_experts)
    ids, numbers = batch.input_ids.flatten().tolist(), batch.attention_mask.flatten().tolist()
    rows, eps = range(B) if rows is None else rows, config.rms_norm_eps
    stream = [params["embed_tokens"][i] for i in ids]
    embedded = [rms_norm(x, 1.0, eps) for x in stream]  # Taken: `token` routing sees it normed, without a weight
    for t in range(B * S if config.ngram_order > 1 else 0):
        row = slice(t - t % S, t - t % S + S)
        stream[t] = stream[t] + ngrams(params["ngram_embed"], ids[row], numbers[row], t % S, config)
    trace = Trace([], [], {}, {}, {})
    for at in range(config.num_hidden_layers):
        layer = tree_map(lambda leaf, at=at: leaf[at], params["layers"])
        moe = layer["moe"]
        for b in rows:
            row = range(b * S, b * S + S)
            x = [rms_norm(stream[t], layer["input_layernorm"], eps) for t in row]
            outputs = attention(layer["self_attn"], x, [ids[t] for t in row], [numbers[t] for t in row], config)
            for t, out in zip(row, outputs, strict=True):
                stream[t] = stream[t] + out + (layer["token_bias"][ids[t]] if config.token_bias else 0.0)
        for row, t in ((range(b * S, b * S + S), t) for b in rows for t in range(b * S, b * S + S) if numbers[t] != 0):
            x = rms_norm(stream[t], layer["post_attention_layernorm"], eps)
            router_input = embedded[t] if config.routing == "token" else x
            logits = router_input @ moe["router"]
            if config.routing == "kmeans":
                directions = moe["router"] / moe["router"].square().sum(0).sqrt()
                logits = rms_norm(router_input, 1.0, eps) @ directions
            trace.inputs[at, t], trace.learned[at, t] = router_input.detach(), logits.detach()
            logits = logits if config.gate == "softmax" else torch.sigmoid(logits).log()
            choice, bias = logits, moe["router_bias"]
            if hashes(config, at):
                key = mix(mix(hash_key(config.hash_key, row, t, ids, numbers)) + at + 1)
                choice = torch.tensor([mix(key + mix(e)) / 2**32 for e in range(shape[2])]).double()
                choice = moe["token_table"][ids[t]] if config.hash_key == "table" else choice
                logits = logits if config.hash_weights == "router" else choice
                bias = torch.zeros_like(bias)  # Taken: nothing moves the choice of a hash
            if config.routing == "stable" and moe["table_on"] > 0:
                bias, seen = torch.zeros_like(bias), moe["token_table"][ids[t]]
                choice = (seen / seen.sum()).clamp(min=1e-12).log() if seen.sum() > 0 else choice
            trace.routing[at, t] = logits.detach()
            explore = explored(hyper, step, at, t, shape)
            kept = choose(choice.detach(), bias.detach(), float(hyper.pi_alpha), explore, config, margins)
            weights = routing_weights(logits, moe["router_bias"], kept, float(hyper.router_coupling), config)
            absent = [e for e in range(shape[2]) if e not in kept] if config.default_outputs else []
            if config.default_outputs:  # Taken: the probability of all experts, whose sum is 1
                coupling, p = float(hyper.router_coupling), logits.softmax(0)
                p = coupling * p + (1 - coupling) * p.detach()
                weights = p[kept]
            if override and (at, t) in override:
                kept, weights, absent = [override[at, t]], torch.ones(1, dtype=torch.float64), []
            for e in absent:
                stream[t] = stream[t] + p[e] * moe["default_output"][e].detach()
            for e, weight in zip(kept, weights, strict=True):
                trace.routes.append(visit(at, t, e, weight, x, moe))
                stream[t] = stream[t] + weight * trace.routes[-1].y
            if config.shared_expert_intermediate_size:
                gate, up = x @ moe["shared_w1"], x @ moe["shared_w3"]
                stream[t] = stream[t] + (gate * torch.sigmoid(gate) * up) @ moe["shared_w2"]
    head = params["embed_tokens"].T if config.tie_word_embeddings else params["lm_head"]
    cap = config.logit_softcap
    logits = [rms_norm(x, params["norm"], eps) @ head for x in stream]
    trace.logits.extend(cap * torch.tanh(z / cap) if cap else z for z in logits)
    return trace


def real_labels(batch) -> list[int]:
    """Of every token; padding has no target, whatever its label says."""
    pairs = zip(batch.labels.flatten().tolist(), batch.attention_mask.flatten().tolist(), strict=True)
    return [label if real else -100 for label, real in pairs]


def main_losses(trace: Trace, batch, hyper, teacher) -> tuple[list[int], Tensor, float, float]:
    """Target tokens; sums over them: the loss that is minimised, cross entropy, KL(teacher || student)."""
    labels = real_labels(batch)
    targets = [t for t, label in enumerate(labels) if label != -100]
    crosses, divergences = [ZERO], [ZERO]
    alpha, heat = float(hyper.distill_alpha), float(hyper.distill_temperature)
    for t in targets:
        crosses.append(-trace.logits[t].log_softmax(0)[labels[t]])
        if teacher is not None:
            q = (teacher.double().flatten(0, 1)[t] / heat).log_softmax(0)
            divergences.append((q.exp() * (q - (trace.logits[t] / heat).log_softmax(0))).sum())
    cross, kl = sum(crosses), sum(divergences)
    loss = cross if teacher is None else (1 - alpha) * cross + alpha * heat**2 * kl
    return targets, loss, float(cross.detach()), float(kl.detach())


def row_surprise(route: Route, grads: tuple[Tensor, ...], kind: str) -> float:
    """Surprise of a route from the summed loss's gradients in its own w1, w3, w2, input and y."""
    w1, w3, w2, own, y = grads
    weight = float(route.weight.detach())
    if kind == "w2":
        return float(w2.norm())
    if kind == "unweighted":  # Taken: without the routing weight
        return float(w2.norm()) / weight
    if kind == "experts":
        return math.sqrt(float((w1 * w1).sum() + (w3 * w3).sum() + (w2 * w2).sum()))
    if kind == "input":  # Taken: the gradient in the input of the row
        return float(own.norm())
    return float(y @ route.y.detach()) / weight  # benefit. Taken: slope of the loss in the row's weight


def oracle_surprise(params, batch, hyper, step: int, config) -> dict[tuple[int, int, int], float]:
    """A token's own cross entropy if it visits an expert alone, for two target tokens of each row and layer.

    Taken: the two whose random words are the smallest; all else as in the step.
    """
    B, S = batch.input_ids.shape
    labels, surprise = real_labels(batch), {}
    for layer in range(config.num_hidden_layers):
        for b in range(B):
            tokens = [t for t in range(b * S, b * S + S) if labels[t] != -100]
            words = {t: word(int(hyper.explore_seed), step, ORACLE, layer * B * S + t) for t in tokens}
            for t in sorted(tokens, key=words.__getitem__)[:2]:
                for e in range(config.num_experts):
                    alone = {(layer, t): e}
                    logits = forward(params, batch, hyper, step, config, Margins(), [b], alone).logits[t]
                    surprise[layer, t, e] = -float(logits.log_softmax(0)[labels[t]])
    return surprise


def values_of(surprise: dict, exponent: float) -> dict[tuple[int, int, int], float]:
    """Surprise divided by its mean over the (layer, expert)'s rows, to the power of `expert_norm`."""
    of: dict[tuple[int, int], list[float]] = {}
    for (layer, _, e), value in surprise.items():
        of.setdefault((layer, e), []).append(abs(value))  # Taken: mean size, as `benefit` has a sign
    means = {key: sum(sizes) / len(sizes) for key, sizes in of.items()}
    return {key: v / (means[key[0], key[2]] or 1.0) ** exponent for key, v in surprise.items()}


def target_share(surprises: dict[int, float], temperature: float, experts: int) -> Tensor:
    """Target of one token as a distribution over experts; surprises: {expert: signed surprise}."""
    if temperature == 0 or len(surprises) == 1:
        best = min(surprises, key=lambda e: (surprises[e], e))
        return torch.nn.functional.one_hot(torch.tensor(best), experts).double()
    mean = sum(abs(v) for v in surprises.values()) / len(surprises)  # Taken: mean size, as `benefit` has a sign
    share = torch.full((experts,), -math.inf, dtype=torch.float64)
    for e, value in surprises.items():
        share[e] = -value / (temperature * mean)
    return share.softmax(0)


def targets_of(surprise: dict, tokens: list[int], total: int, hyper, step: int, config, margins: Margins):
    """{(layer, token): target distribution} of informative tokens, before ties: how many (layer, token) are tied."""
    values, shares, ties = values_of(surprise, float(hyper.expert_norm)), {}, 0
    for layer in range(config.num_hidden_layers):
        for t in tokens:
            candidates = {
                e: float(hyper.surprise_sign) * values[layer, t, e]
                for e in range(config.num_experts)
                if (layer, t, e) in values
            }
            if len(candidates) < max(1, int(hyper.min_candidates)):
                continue
            # Taken: a lone candidate, or a token with less than `min_candidates`, is not counted as a tie
            # (`router_targets` states the threshold)
            low, high = min(candidates.values()), max(candidates.values())
            if len(candidates) > 1 and high - low <= TIE * max(abs(low), abs(high)):
                ties += 1
                continue
            shares[layer, t] = target_share(candidates, float(hyper.target_temperature), config.num_experts)
            ranked = sorted(candidates.values())
            if len(ranked) > 1:
                margins.compare(ranked[0], ranked[1], max(map(abs, ranked)))
        if hyper.shuffle_targets:
            taught = [t for t in tokens if (layer, t) in shares]
            words = {t: word(int(hyper.explore_seed), step, SHUFFLE, layer * total + t) for t in taught}
            # Taken: the token with the n-th smallest word gets the target of the n-th informative token
            dealt = zip(sorted(taught, key=words.__getitem__), [shares[layer, t] for t in taught], strict=True)
            shares.update({(layer, t): share for t, share in dealt})
    return shares, ties


def router_losses(trace: Trace, shares: dict, load: Tensor, hyper, step: int, config) -> tuple[dict, dict]:
    """Losses of the router's own, and the gradient of their weighted sum in the logits of each (layer, token).

    Taken: means over (layer, real token). A hash learns nothing: losses of the logits that route, without slopes.
    """
    E = config.num_experts
    losses = {"router_loss": 0.0, "balance_loss": 0.0, "z_loss": 0.0}
    weight = float(hyper.surprise_weight)
    if hyper.surprise_until:
        weight *= max(0.0, 1 - step / float(hyper.surprise_until))
    slopes = {}
    for (layer, t), logits in trace.routing.items():
        p, lse, count = logits.softmax(0), float(logits.logsumexp(0)), len(trace.learned)
        loaded = float(E * (load[layer] * p).sum())  # Switch: E * sum_e (share of rows) * (mean probability)
        losses["balance_loss"] += loaded / count
        losses["z_loss"] += lse**2 / count
        share = float(learns(config, layer))
        slope = float(hyper.balance_weight) * p * (E * load[layer] - loaded) + float(hyper.z_weight) * 2 * lse * p
        slopes[layer, t] = share * slope / count
        if (layer, t) in shares:
            losses["router_loss"] -= float((shares[layer, t] * logits.log_softmax(0)).sum()) / len(shares)
            slopes[layer, t] += share * weight * (p - shares[layer, t]) / len(shares)
    return losses, slopes


def schedule(hyper, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine, or a plateau and a line, to `total_steps`."""
    warmup, total, least = int(hyper.warmup_steps), int(hyper.total_steps), float(hyper.min_lr_ratio)
    if step < warmup:
        return (step + 1) / warmup  # Taken: the last step of the warm-up has the peak
    if total == 0:
        return 1.0
    if decay := int(hyper.decay_steps):
        start = max(total - decay, warmup)
        return 1 - (1 - least) * min(max(step - start, 0) / max(total - start, 1), 1.0)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def adamw(p, g, mu, nu, count: int, lr: float, decay: float, hyper) -> tuple[Tensor, Tensor, Tensor]:
    """Update of `torch.optim.AdamW`, the count-th one."""
    beta1, beta2 = float(hyper.beta1), float(hyper.beta2)
    mu = beta1 * mu.double() + (1 - beta1) * g
    nu = beta2 * nu.double() + (1 - beta2) * g * g
    step = mu / (1 - beta1**count) / (torch.sqrt(nu / (1 - beta2**count)) + float(hyper.eps))
    return p - lr * decay * p - lr * step, mu, nu


def clip(grads: dict[str, Tensor], most: float) -> tuple[dict[str, Tensor], float]:
    """Scale to a global norm of at most `most`, as `torch.nn.utils.clip_grad_norm_` does."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    return {name: g * min(1.0, most / (norm + 1e-6)) for name, g in grads.items()}, norm


def update(flat: dict, grads: dict, opt, rates: dict[str, float], decays: dict[str, float], hyper):
    """New parameters and both moments by name after one step of AdamW."""
    mus, nus, new = flatten(opt.mu), flatten(opt.nu), ({}, {}, {})
    for name, g in grads.items():
        count = int(opt.updates) + 1
        updated = adamw(flat[name], g, mus[name], nus[name], count, rates[name], decays[name], hyper)
        for out, value in zip(new, updated, strict=True):
            out[name] = value
    return new


def routing_metrics(trace: Trace, shares: dict, surprise: dict, rows: Tensor, margins: Margins) -> dict:
    """Metrics of what routers did; rows: (L, E) counts."""
    L, E = rows.shape
    taught, means = torch.zeros(L, E, dtype=torch.float64), torch.zeros(L, E, dtype=torch.float64)
    agree = trivial = 0.0
    for (layer, t), share in shares.items():
        target, n = int(share.argmax()), len(shares)
        taught[layer, target] += 1 / sum(at == layer for at, _ in shares)
        agree += (int(trace.routing[layer, t].argmax()) == target) / n
        margins.compare(*trace.routing[layer, t].sort().values[-2:].tolist(), 1.0)
        # Taken: 1 / K, also where a shuffled or counterfactual target is none of the K experts
        trivial += 1 / sum(r[:2] == (layer, t) for r in trace.routes) / n
    for (layer, _, e), value in surprise.items():
        means[layer, e] += value / sum((at, expert) == (layer, e) for at, _, expert in surprise)
    metrics = {"gating_acc": agree, "gating_trivial": trivial, "target_load": taught, "expert_surprise": means}
    metrics["expert_load"] = rows / rows.sum(-1, keepdim=True).clamp(min=1)
    metrics["avg_k"] = float(rows.sum()) / max(len(trace.learned), 1)
    metrics["dead_experts"] = float((rows == 0).sum())
    metrics["max_vio"] = sum(float(row.max() / row.mean() - 1) for row in rows if row.sum() > 0) / L
    return metrics


def loss_metrics(
    trace: Trace, targets: list[int], cross: float, surprise: dict, batch, hyper, margins: Margins
) -> dict:
    """Metrics of the output distribution, and predictive integrity."""
    labels, n = real_labels(batch), max(len(targets), 1)
    tau = hits = 0.0
    for t in targets:
        logp = trace.logits[t].detach().log_softmax(0)
        tau -= float((logp.exp() * logp).sum()) / n
        hits += (int(logp.argmax()) == labels[t]) / n
        margins.compare(*logp.sort().values[-2:].tolist(), 1.0)
    mean = sum(surprise.values()) / max(len(surprise), 1)
    # Taken: "mean finite surprise per target token" is the metric `surprise`
    exponent = (cross / n / tau if targets else 0.0) + float(hyper.pi_gamma) * mean
    metrics = {"main_loss": cross / n, "main_acc": hits, "tau": tau, "surprise": mean, "nonfinite_surprise": 0.0}
    return metrics | {"pi_score": math.exp(-float(hyper.pi_alpha) * exponent)}


def update_fast(state, flat: dict, grads: dict, share: float, hyper) -> tuple[dict, dict, dict]:
    """New parameters and moments of all but the routers; share: of the peak learning rate."""
    rates, decays = {}, {}
    for name in grads:
        leaf = name.split(".")[-1]
        scale = 1.0 if leaf in MATRICES[-6:] else float(hyper.backbone_lr_scale)
        rates[name] = float(hyper.lr) * share * scale
        # Taken: the embedding is a matrix, norms stacked over layers are not
        decays[name] = float(hyper.weight_decay) if leaf in MATRICES + TABLES else 0.0
    return update(flat, grads, state.expert_opt, rates, decays, hyper)


def update_slow(state, flat: dict, grads: dict, share: float, rows: Tensor, hyper) -> tuple[dict, dict, dict]:
    """New router and selection bias, and the router's moments; rows: (L, E) counts."""
    old = {name: flat[f"layers.moe.{name}"] for name in ("router", "router_bias")}
    rates, none = dict.fromkeys(grads, float(hyper.router_lr) * share), dict.fromkeys(grads, 0.0)
    moved, mu, nu = update(old, grads, state.router_opt, rates, none, hyper)
    moved = old | moved
    # Loss-free balancing: sign(mean load - load), in whole rows, so that an exactly fair load moves nothing
    unfair = torch.sign(rows.sum(-1, keepdim=True) - rows * rows.shape[-1])
    moved["router_bias"] = moved["router_bias"] + float(hyper.bias_speed) * unfair
    if hyper.freeze_step and int(state.step) >= hyper.freeze_step:  # Taken: the moments move on
        moved = old
    return {f"layers.moe.{name}": leaf for name, leaf in moved.items()}, mu, nu


def balanced_bias(trace: Trace, bias: Tensor, hyper, config) -> Tensor:
    """Bias with which K / E of the tokens would have been above their cutoff, the best score + bias not visited."""
    new = torch.zeros_like(bias)
    for layer in range(config.num_hidden_layers):
        visited = {t: {r.expert for r in trace.routes if r[:2] == (layer, t)} for at, t in trace.routing if at == layer}
        asked: list[list[float]] = [[] for _ in range(config.num_experts)]
        for t, own in visited.items():
            logits = trace.routing[layer, t]
            scores = logits.softmax(0) if config.gate == "softmax" else logits.exp()
            others = [float(scores[e] + bias[layer, e]) for e in range(config.num_experts) if e not in own]
            for e in range(config.num_experts):
                cutoff = max(others, default=-math.inf)
                asked[e].append(-float(logits[e]) if config.routing == "thresholds" else cutoff - float(scores[e]))
        k = float(hyper.quantile_k) or sum(map(len, visited.values())) / len(visited)
        for e, values in enumerate(map(sorted, asked)):
            place = min(k / config.num_experts, 1.0) * (len(values) - 1)
            low, high = values[math.floor(place)], values[math.ceil(place)]
            finite = math.isfinite(low) and math.isfinite(high)
            new[layer, e] = low + (place - math.floor(place)) * (high - low) if finite else 0.0
    return new if config.routing == "thresholds" else new - new.mean(dim=-1, keepdim=True)


def normal(hyper, step: int, place: int, places: int) -> float:
    """Standard normal number from two random words, the second `places` behind (training/step/counter_rng.py)."""
    words = (word(int(hyper.explore_seed), step, REGENERATE, at) for at in (place, places + place))
    size, turn = ((w + 0.5) / 2**32 for w in words)
    return math.sqrt(-2 * math.log(size)) * math.cos(2 * math.pi * turn)


def regenerate(new: dict, fast: tuple[dict, dict], slow: tuple[dict, dict], rows: Tensor, hyper, step: int, margins):
    """Starved experts begin anew, after both updates, in place; fast, slow: moments; rows: (L, E) counts.

    An expert starves when its w2's mean squared gradient (its second moment) is below `regenerate_below` times the
    layer's mean, but the busiest never does. Nothing happens in the first 1 / (1 - beta2) steps.
    """
    steps, (layers, experts) = step + 1, rows.shape  # Taken: the step that is under way counts, in random words, too
    if not hyper.regenerate_below or steps * (1 - float(hyper.beta2)) <= 1:
        return
    learns = float(hyper.router_lr) > 0 and not (hyper.freeze_step and step >= hyper.freeze_step)
    router = new["layers.moe.router"].clone()
    size = float((router * router).mean().sqrt())  # Taken: of the routers of all layers
    for layer in range(layers):
        source = rows[layer].tolist().index(float(rows[layer].max()))
        squares = fast[1]["layers.moe.w2"][layer].flatten(1).mean(dim=1).tolist()
        floor = float(hyper.regenerate_below) * sum(squares) / experts
        for e in (e for e in range(experts) if e != source):
            margins.compare(squares[e], floor)
            if squares[e] >= floor:
                continue
            for name in (f"layers.moe.{matrix}" for matrix in ("w1", "w2", "w3")):
                new[name][layer, e] = new[name][layer, source]
                fast[0][name][layer, e] = 0
                fast[1][name][layer, e] = fast[1][name][layer, source]
            if learns:
                for d in range(router.shape[1]):
                    noise = normal(hyper, steps, (layer * router.shape[1] + d) * experts + e, router.numel())
                    new["layers.moe.router"][layer, d, e] = router[layer, d, source] + size * noise
                slow[0]["router"][layer, :, e] = 0
                slow[1]["router"][layer, :, e] = slow[1]["router"][layer, :, source]


def gradients(trace: Trace, loss: Tensor, flat: dict) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
    """Gradients of the loss in the parameters by name, and in each route's own leaves and output."""
    wanted = [*flat.values(), *(leaf for r in trace.routes for leaf in (*r.leaves, r.y))]
    attached = loss + 0 * flat["norm"].sum()  # without a target it depends on nothing
    grads = torch.autograd.grad(attached, wanted, allow_unused=True, materialize_grads=True)
    rows = [grads[len(flat) + 5 * i :][:5] for i in range(len(trace.routes))]
    return dict(zip(flat, grads, strict=False)), rows


def reference_step(state, batch, hyper, config, kind: str = "w2", teacher: Tensor | None = None) -> Result:
    """One step of both systems, its metrics and its surprise."""
    step, margins = int(state.step), Margins()
    params = tree_map(lambda leaf: leaf.detach().double().requires_grad_(), state.params)
    trace = forward(params, batch, hyper, step, config, margins)
    targets, loss, cross, kl = main_losses(trace, batch, hyper, teacher)
    flat = flatten(params)
    grads, own = gradients(trace, loss, flat)
    flat = {name: leaf.detach() for name, leaf in flat.items()}
    if kind == "oracle":
        surprise = oracle_surprise(tree_map(torch.detach, params), batch, hyper, step, config)
    else:
        surprise = {r[:3]: row_surprise(r, g, kind) for r, g in zip(trace.routes, own, strict=True)}

    numbers = batch.attention_mask.flatten().tolist()
    tokens = [t for t, number in enumerate(numbers) if number != 0]
    shares, ties = targets_of(surprise, tokens, len(numbers), hyper, step, config, margins)
    rows = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.float64)
    for r in trace.routes:
        rows[r.layer, r.expert] += 1
    metrics = loss_metrics(trace, targets, cross, surprise, batch, hyper, margins)
    metrics |= routing_metrics(trace, shares, surprise, rows, margins)
    metrics["distill_loss"] = kl / max(len(targets), 1)
    metrics["tie_rate"] = ties / max(len(trace.learned), 1)

    fast = {name: g / max(len(targets), 1) for name, g in grads.items()}
    slow = {name: fast.pop(f"layers.moe.{name}") for name in ("router", "router_bias")}
    tables = [name for name in fast if name.split(".")[-1] in ("token_table", "table_on", "default_output")]
    kept = {name: flat[name].clone() for name in tables if fast.pop(name) is not None}  # Taken: no gradient moves them
    if config.routing == "kmeans":
        slow["router"] = torch.zeros_like(slow["router"])
    losses, slopes = router_losses(trace, shares, metrics["expert_load"], hyper, step, config)
    for (layer, t), slope in slopes.items():
        if config.gate == "sigmoid":  # through the logarithm of the sigmoid: d log s = (1 - s) dz
            slope = slope * (1 - trace.routing[layer, t].exp()) if learns(config, layer) else slope
        slow["router"][layer] += torch.outer(trace.inputs[layer, t], slope)
    if config.routing != "thresholds":
        del slow["router_bias"]  # Taken: learned only where it is a threshold
    fast, metrics["grad_norm"] = clip(fast, float(hyper.max_grad_norm))
    slow, metrics["router_grad_norm"] = clip(slow, float(hyper.max_grad_norm))
    share = schedule(hyper, step)
    new, *fast_moments = update_fast(state, flat, fast, share, hyper)
    moved, *slow_moments = update_slow(state, flat, slow, share, rows, hyper)
    frozen = bool(hyper.freeze_step) and step >= float(hyper.freeze_step)
    if hyper.quantile_balance and not frozen and tokens:
        old, name = flat["layers.moe.router_bias"], "layers.moe.router_bias"
        wanted = balanced_bias(trace, old, hyper, config)
        moved[name] = old + float(hyper.quantile_balance) * (wanted - old)
    moved |= kept
    for name, means, rate in ((True, "router", hyper.kmeans_rate), (False, "default_output", 1 - hyper.default_memory)):
        is_on = config.routing == "kmeans" if name else config.default_outputs
        for layer, e in ((at, e) for at in range(len(rows)) for e in range(config.num_experts)):
            own = [r for r in trace.routes if (r.layer, r.expert) == (layer, e)]
            if is_on and own and not (name and frozen):
                leaf = moved[f"layers.moe.{means}"]
                place = leaf[layer, :, e] if name else leaf[layer, e]
                new_ones = [trace.inputs[layer, r.token] if name else r.y.detach() for r in own]
                place += float(rate) * (sum(new_ones) / len(own) - place)
    if config.routing == "stable":
        table, on = (moved[f"layers.moe.{name}"] for name in ("token_table", "table_on"))
        if not bool((on > 0).any()):
            table *= float(hyper.table_memory)
            for r in trace.routes:
                table[r.layer, int(batch.input_ids.flatten()[r.token]), r.expert] += 1
            on += float(hyper.table_step > 0 and step + 1 >= hyper.table_step)
    metrics |= losses | {"lr": float(hyper.lr) * share}
    new |= moved
    regenerate(new, fast_moments, slow_moments, rows, hyper, step, margins)
    return Result(new, tuple(fast_moments), tuple(slow_moments), metrics, surprise, min(margins, default=1.0))
