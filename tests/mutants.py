"""Small faults on purpose: each is one change of one line, which some test must notice (`python -m tests.mutation`)."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in the file; with `new` in its place the suite must fail."""

    file: str
    old: str
    new: str


ROUTING = [
    ("(mass_before < budget)", "(mass_before <= budget)"),
    (" | (budget >= 1)", ""),
    ("(budget >= 1) | (rank < config.min_experts_per_tok)", "(budget >= 1)"),
    ("> 0) | (rank < config.min_experts_per_tok)", "> 0)"),
    ("1 + soft - soft.detach()", "soft"),
    ('logits if config.routing == "thresholds" else p', "p"),
    ("(budget >= 1) | (rank < config.min", "(budget >= 1) | (rank <= config.min"),
    ("ranked if bias is None else ranked + bias", "ranked"),
    ("[..., :-1], (1, 0))", "[..., 1:], (0, 1))"),
    ("active = kept & rearrange(real", "active = kept | rearrange(real"),
    ("kept_logits.softmax(dim=-1) * active", "kept_logits.softmax(dim=-1)"),
    ("= logits.gather(-1, expert_ids)", "= (logits if bias is None else logits + bias).gather(-1, expert_ids)"),
    ("masked_fill(~active, torch.finfo(logits.dtype).min)", "clone()"),
    ("(wanted >= 0)", "(wanted > 0)"),
    ("clamp_max(rank.shape[0] - 1)", "clamp_max(max(rank.shape[0] - 2, 0))"),
    ("torch.where(expert_ids == wanted, displaced, expert_ids)", "expert_ids"),
    ("kept | (new & (rank == slot))", "kept"),
    ("router_logits.to(wide_dtype(router_logits.dtype))", "router_logits"),
    ("topk(slots, dim=-1)", "topk(slots, dim=-1, largest=False)"),
    ("kernels.top(scores, slots)", "kernels.top(-scores, slots)"),
    ("torch.where(routing.expert_ids == wanted, first, routing.expert_ids)", "routing.expert_ids"),
    ("slot_0 & real[:, None]", "slot_0"),
    ("active.sum(dim=-1, keepdim=True).clamp_min(1)", "active.sum(dim=-1, keepdim=True)"),
    ("((expert_ids == wanted) & kept).any", "(expert_ids == wanted).any"),
]
EXPERTS = [
    ("torch.where(active, expert_ids, num_experts)", "expert_ids"),
    ("sort(stable=True)", "sort(stable=True, descending=True)"),
    ("counts[..., :num_experts].cumsum", "counts[..., 1:].cumsum"),
    ("Rows(order // routing", "Rows(order % routing"),
    ("gate, up = apply", "up, gate = apply"),
    ("routing.weights.to(y.dtype)", "routing.active.to(y.dtype)"),
    ("torch.zeros_like(order).scatter(-1, order, positions)", "order"),
    ("rows._replace(order=number, inverse=number)", "rows._replace(order=number)"),
    ("rows.order // (rows.order.shape[0] // x.shape[0])", "rows.token"),
]
GROUPED = [
    ("grad_rows = GroupedMatmul.apply(grad, weights.mT,", "grad_rows = GroupedMatmul.apply(grad, weights.mT.detach(),"),
    ("GroupedOuter.apply(rows, grad, offsets) if ctx", "GroupedOuter.apply(rows, grad.detach(), offsets) if ctx"),
    ("out[int(offsets[-1]) :] = 0", "pass"),
    (".masked_fill(behind.unsqueeze(-1), 0)", ""),
    ("% 16 == 0", "% 4 == 0"),
    ("= (torch.float32, torch.bfloat16) if", "= (torch.float32, torch.bfloat16, torch.float64) if"),
    ("[:, :-1]\n", "[:, 1:]\n"),
    ("dim=1) + starts * rows)", "dim=1) + starts)"),
    ("return first + second", "return first"),
    ("return first + more[0] if more else first", "return first"),
    ("GroupedMatmul.apply(grads, grad.mT, offsets)", "GroupedMatmul.apply(grads, -grad.mT, offsets)"),
    ("grad_grads = GroupedMatmul.apply(rows, grad,", "grad_grads = GroupedMatmul.apply(rows, 2 * grad,"),
    ("apply(grad, other_weights.mT, offsets)", "apply(grad, other_weights.mT.detach(), offsets)"),
    ("GroupedOuter.apply(others, grad, offsets)", "GroupedOuter.apply(rows, grad, offsets)"),
    ("if t.numel() == 0 or 0 in t.stride():", "if t.numel() == 0:"),
]  # fmt: skip
GATED = [
    ("offsets), matmul_kernel(rows, w3", "offsets), matmul_kernel(rows, w1"),
    ("for w in (w1, w3))\n            return", "for w in (w3, w1))\n            return"),
    ("for grad in (gate, up))", "for grad in (up, gate))"),
    ("undo_dispatch(grad_rows, order, inverse,", "undo_dispatch(grad_rows, order, order,"),
    ("if native.may_run(x, gate, up):", "if native.can_take(x, gate, up):"),
    ("GroupedSum.apply(gate, w1.mT, up, w3.mT, offsets)", "GroupedSum.apply(gate, w1.mT, up, w1.mT, offsets)"),
    ("GroupedOuter.apply(rows, up, offsets)", "GroupedOuter.apply(rows, gate, offsets)"),
]  # fmt: skip
DISPATCH = [
    ("(torch.arange(runs, device=index.device) * rows,", "(torch.arange(runs, device=index.device) * 0,"),
    ("rows.new_ones(", "rows.new_zeros("),
    (
        "weights.flatten(0, -2), _fold_index(order), _fold_index(inverse)",
        "weights.flatten(0, -2), _fold_index(inverse), _fold_index(order)",
    ),
    ("x.index_select(0, order // slots)", "x.index_select(0, order % x.shape[0])"),
    ("reduce(y * rows", "reduce(rows * rows"),
    ('1").index_select(0, order)', '1").index_select(0, inverse)'),
    ("if not ctx.needs_input_grad[1] and native", "if native"),
]
NATIVE = [
    ("and any(t.requires_grad for t in tensors)", "and False"),
    ("is_functorch_wrapped_tensor(t) or is_traced(t)", "is_traced(t)"),
    ("t.dtype == torch.float32 and", ""),
]
KERNELS = [
    ("given = [t.contiguous() for t in (x, weights, order)]", "given = [x, weights, order]"),
    ("given = [t.contiguous() for t in (params, grads, mu, nu)]", "given = [params, grads, mu, nu]"),
    ("return grad_x, partial[:, 0]", "return grad_x, partial[:, -1]"),
    ("grad_qkv, grad_norms.sum(dim=1)", "grad_qkv, grad_norms[:, 0]"),
    ("bias.shape[0], *made", "1, *made"),
]
TWINS = [
    ("if native.may_run(*slopes, *inputs[: twin.differentiable]):", "if native.can_take(*slopes):"),
    ("return *push_forward(dots[: twin.differentiable]),", "return *pull_back(tuple(out)),"),
    ("tuple(t.clone() for t in twin.plain(*inputs))", "twin.plain(*inputs)"),
    ("ctx.mark_non_differentiable(*output[twin.smooth :])", "pass"),
    ("return out, (0,) * len(out)", "return out, (0,) + (None,) * (len(out) - 1)"),
]
HEADS = [
    ("rotary[0].ndim == 2", "True"),
    ("turned = rotate(qk, cosines, sines)", "turned = qk"),
    ("rms_norm(qk, None, eps)", "qk"),
    ("t.flatten(0, -3)[0]", "t.flatten(0, -3)[-1] * 1.01"),
]
MAPPED = [
    ("if level.level() not in found:", "if True:"),
    ("or not only_vmaps():\n        return function", "or False:\n        return function"),
    ("stack or _LEFT.get()", "[]"),
    ("_LEFT.get() or []", "[]"),
    ("t = functorch._add_batch_dim(t, 0, level.level())", "t = functorch._add_batch_dim(t, -1, level.level())"),
    (".movedim(functorch.maybe_get_bdim(t), 0)  # those", ".movedim(0, 0)  # those"),
]
CROSS_ENTROPY = [
    ("is_target = labels != IGNORE_INDEX", "is_target = labels != -101"),
    ("for x in (-picked, entropy))", "for x in (-picked, picked))"),
    ("-reduce(seen.exp() * seen", "-reduce(seen"),
    ("seen.argmax(dim=-1)", "seen.argmin(dim=-1)"),
    ("grads[0], logits, labels, outputs[3]", "grads[0], logits, labels, outputs[0]"),
]
GROUPED_C = [
    ("memset(result + (run * n + start) * out, 0,", "memset(result + (run * n + start) * out, 1,"),
    ("int64_t start = group % experts ?", "int64_t start = group ?"),
    ("rows + task.row / n * tokens * in", "rows"),
    ("group != task.group", "group == -1"),
    ("else memset(part, 0,", "else memset(part, 64,"),
    ("rows + group / experts * tokens * in + from", "rows + from"),
    (
        "sums + j * LANES, LANES,\n                    term ? MORE : NEW",
        "sums + j * LANES, LANES,\n                    NEW",
    ),
]
NORMS_C = [
    ("factor * along * x[j]", "along * x[j]"),
    ("t / n * dim", "0"),
    ("first * c[j] + second * s[j];", "first * c[j] - second * s[j];"),
    ("grad[j] * c[j] + grad[j + half] * s[j + half]", "grad[j] * c[j] + grad[j + half] * s[j]"),
    ("weight + run * dim", "weight"),
    ("for (int64_t part = 1; part < parts;", "for (int64_t part = 2; part < parts;"),
]
LOSSES_C = [
    ("logf(sums[0]) - sums[1] / sums[0]", "logf(sums[0])"),
    ("to[labels[i]] -= grad;", ";"),
    ("entropies[i] = labels[i] < 0 ? 0 :", "entropies[i] ="),
    ("x[first] != most", "x[first] < most - 1"),
]
ROWS_C = [
    ("share * (1 + gate[i] * (1 - share))", "share"),
    ("while (taken < rank &&", "while (taken < 0 &&"),
    ("order[i] / slots * dim", "order[i] % slots * dim"),
    ("to[j] += weight * from[j]", "to[j] += from[j]"),
    ("int64_t at = active[i] ? ends[ids[i]]++ : last++;", "int64_t at = ends[ids[i]]++;"),
    ("inverse[i] = at;", "inverse[first + at] = i - first;"),
    ("expert[first + at] = active[i] ? ids[i] : experts;", "expert[first + at] = ids[i];"),
    ("left[j] = -INFINITY;", ";"),
    ("x[i * width + j] == x[i * width + j] ?", "1 ?"),
]
ATTENTION_C = [
    ("p[r * seq + j] * (s[r * seq + j] - mean)", "p[r * seq + j] * s[r * seq + j]"),
    ("for (int64_t j = n; j < width; j++) p[j] = 0;", ";"),
    ("int how = h > t * share ? MORE : NEW;", "int how = NEW;"),
    ("(h / heads * seq + i) * heads + h % heads", "(h / heads * seq + i) * heads"),
]
ADAMW_C = [
    ("params[i] * decay", "params[i]"),
    ("grads[i] * scale", "grads[i]"),
    ("numbers + 6 * (t / parts)", "numbers"),
    ("into_nu * (grad * grad - nu[i])", "into_mu * (grad * grad - nu[i])"),
]
HOOKS = [
    ("handle.remove()", "pass"),
    ("saved.clear()", "pass"),
    ("self.per_token_surprise[layer]", "self.per_token_surprise[0]"),
    ("if inside.requires_grad:", "if True:"),
    ("record, grad.detach(), axes", "record, grad, axes"),
    ("record(wrap(grad, axes))", "record(grad)"),
    ("with inside_again():", "if True:"),
    ("x, rows = spread(x, rows)", "spread(x, rows)"),
    ("row_norm(x).gather(0, input_of(x, rows)) * row_norm(grad)", "row_norm(grad)"),
    ('(y if self._kind == "benefit" else hidden)', "hidden"),
    (".hypot(parts[1]).hypot(parts[2])", ".hypot(parts[1])"),
    ("if len(parts) == 3:", "if len(parts) == 2:"),
    ('{"experts": out, "input": (x,)}', '{"experts": out, "input": out}'),
    ("self._handles.clear()", "pass"),
    ("else hidden).detach()", "else hidden)"),
]
OBJECTIVES = [
    ("(labels != IGNORE_INDEX).sum()", "(labels != -101).sum()"),
    ("(best == labels)", "(best != labels)"),
    ("where(labels != IGNORE_INDEX, kl", "where(labels != -101, kl"),
    ("(x / temperature).log_softmax", "x.log_softmax"),
    ("(teacher_logits.to(logits.dtype), logits)", "(logits, teacher_logits.to(logits.dtype))"),
    ("losses.sum()", "losses.mean()"),
    ("entropies.detach().sum()", "losses.detach().sum()"),
    ("main_loss / tau.clamp", "main_loss * tau.clamp"),
    ("+ pi_gamma * surprise))\n", "- pi_gamma * surprise))\n"),
    ("per_token_surprise * sign", "per_token_surprise"),
    ("candidates >= min_candidates", "candidates > min_candidates"),
    ("(lowest == highest)", "(lowest > highest)"),
    ("eligible = real & ", "eligible = "),
    ("eligible & ~tied\n", "eligible\n"),
    ("eligible & (candidates > 1) & ", "eligible & "),
    ("signed.argmin(dim=-1)", "signed.argmax(dim=-1)"),
    ("balance = experts * (load", "balance = (load"),
    ("(load * mean_p).sum() / layers", "(load * mean_p).sum()"),
    ("real.unsqueeze(-1), dim=1) / tokens", "torch.ones_like(real).unsqueeze(-1), dim=1) / tokens"),
    ("logsumexp(dim=-1).square()", "logsumexp(dim=-1)"),
    ("/ informative.clamp_min(1)", "/ targets.informative.numel()"),
    ("hyper.z_weight * z", "hyper.z_weight * balance"),
    ("lowest.unsqueeze(-1) - signed", "signed - lowest.unsqueeze(-1)"),
    ("below / width.unsqueeze(-1)", "below"),
    ("scatter(-1, to_place, targets", "scatter(-1, from_place, targets"),
    ("torch.where(targets.informative, words, places + behind)", "torch.where(targets.informative, words, places)"),
    ("log_p.clamp_min(torch.finfo(log_p.dtype).min)", "log_p"),
    ("tau.clamp_min(torch.finfo(tau.dtype).tiny)", "tau"),
    ("behind = 1 << 33", "behind = 1 << 10"),
    (" & (candidates >= 1)", ""),
    ("torch.where(finite, signed, -torch.inf)", "torch.where(finite, signed, 0.0)"),
]
HYPER_STEP = [
    ("global_norm(part.grads) / part.sums.targets.clamp_min(1)", "global_norm(part.grads)"),
    ("hyper.max_grad_norm) / sums.targets.clamp_min(1)", "hyper.max_grad_norm)"),
    ("weight_decay=0.0, hyper=hyper", "weight_decay=hyper.weight_decay, hyper=hyper"),
    ("lr=hyper.router_lr * rate * learning", "lr=hyper.router_lr * learning"),
    ("lr=hyper.lr * schedule(step, hyper), weight", "lr=hyper.lr, weight"),
    ("router_opt, state.step + 1)", "router_opt, state.step)"),
    ("(load.mean(dim=-1, keepdim=True) - load)", "(load - load.mean(dim=-1, keepdim=True))"),
    ("rearrange(batch.attention_mask != 0", "rearrange(batch.attention_mask == 0"),
    ("main[name] / targets_count", "main[name]"),
    ('("router", "router_bias") if config.routing == "thresholds"', '("router",) if config.routing == "thresholds"'),
    ("load, part.real, annealed", "load, torch.ones_like(part.real), annealed"),
    ("hyper.bias_speed * learning", "hyper.bias_speed"),
    ("(1 - step / until.clamp_min(1))", "(1 - (step + 1) / until.clamp_min(1))"),
    ("(step < last)", "(step <= last)"),
    (
        "surprise, real, hyper.min_candidates, hyper.surprise_sign, hyper.target_temperature",
        "surprise, real, hyper.min_candidates, hyper.surprise_sign",
    ),
    ("grad_scale=clip_factor(router_grad_norm, hyper.max_grad_norm)", "grad_scale=1.0"),
    ("lr=hyper.router_lr * rate * learning", "lr=hyper.router_lr * rate"),
    (".sign()).to(bias.dtype)", ").to(bias.dtype)"),
    ("backbone_scale=hyper.backbone_lr_scale", "backbone_scale=1.0"),
    ("until.clamp_min(1)).clamp_min(0)", "until.clamp_min(1))"),
    ("(step < last) | (last <= 0)", "step < last"),
]
MAIN_GRADIENTS = [
    ("surprise_budget=hyper.pi_alpha", "surprise_budget=0.5"),
    ("router_coupling=hyper.router_coupling,", "router_coupling=0.0,"),
    ("hyper._replace(explore_prob=0.0)", "hyper"),
    ("if kind in PER_WEIGHT:", "if False:"),
    ("(1 - alpha) * total + alpha", "total + alpha"),
    ("hyper.distill_temperature**2 * kl", "kl"),
]
SURPRISE = [
    ("return row_norm(x) * row_norm(grad)", "return row_norm(grad)"),
    ("return row_norm(x) * row_norm(grad)", "return row_norm(x) + row_norm(grad)"),
    ("torch.inf).scatter", "0.0).scatter"),
    ("rows.token * spare + rows.expert", "rows.token * experts + rows.expert"),
    ("[:, :experts]", "[:, 1:]"),
    ("dtype=torch.promote_types(x.dtype, torch.float32)", "dtype=x.dtype"),
    ("return surprise / ones", "return surprise * ones"),
    ("surprise.abs(), 0.0)", "surprise, 0.0)"),
    ("1.0) ** exponent", "1.0) ** 1"),
    ("active & (weights > 0)", "active"),
    ("torch.where(mean > 0, mean, 1.0)", "mean"),
    ("(x.to(wide) * grad.to(wide))", "(x * grad)"),
]
STEP_METRICS = [
    ("== targets.expert) & targets.informative", "== targets.expert)"),
    ("1 / trace.active.sum(dim=-1).clamp_min(1)", "1 / trace.active.shape[-1]"),
    ("(sums.real * layers).clamp_min(1)", "sums.real.clamp_min(1)"),
]
REGENERATE = [
    ("squares < floor", "squares <= floor * 1e6"),
    ("* (1 - hyper.beta2) > 1", "* (1 - hyper.beta2) > 0"),
    ("load.argmax", "load.argmin"),
    ("mu=replaced(expert_opt.mu, 0.0)", "mu=replaced(expert_opt.mu, 1.0)"),
    ("nu=replaced(expert_opt.nu, 1.0)", "nu=replaced(expert_opt.nu, 0.0)"),
    ("+ noise * router", "+ 0 * noise * router"),
]
OPTIM = [
    ("(1 - hyper.beta1**t)", "(1 - hyper.beta1)"),
    ("1 - lr * share * weight_decay", "1 - share * weight_decay"),
    ("grad.square()", "grad.abs()"),
    ("weight_decay if decays else 1.0", "weight_decay"),
    (".clamp_max(1.0)\n\n\ndef schedule", "\n\n\ndef schedule"),
    ("((at + 1) / warmup", "(at / warmup"),
    ("0.5 * (1 + torch.cos", "0.5 * (1 - torch.cos"),
    ("torch.finfo(nu.dtype).tiny", "0.0"),
    ('endswith("norm")', 'endswith("q_norm")'),
    ("grad = g[name] * scale", "grad = g[name]"),
    (
        "unfold_runs(made[0]), unfold_runs(made[1]), unfold_runs(made[2])",
        "unfold_runs(made[0]), mu[name], unfold_runs(made[2])",
    ),
    ("(is_backbone(name), has_decay(name)) for", "(False, has_decay(name)) for"),
    ("torch.where(total > 0, cosine, 1.0)", "cosine"),
    ("hyper.eps * root_correction", "hyper.eps"),
    ("step_size * share * root_correction", "step_size * root_correction"),
    (".clamp(0.0, 1.0)", ".clamp(0.0, 2.0)"),
]
METRICS = [
    ("(highest - mean) / torch", "highest / torch"),
    ("(load == 0).sum()", "(load <= 0.1).sum()"),
    ("index = torch.where(counted, index, bins)", "index = index"),
    ("return visits / (active.shape[0] * real.sum())", "return visits / (real.sum())"),
    ("kept, finite = _finite_or_zero(x), x.isfinite()", "kept, finite = _finite_or_zero(x), torch.ones_like(x)"),
]

MUTANTS = [
    Mutant(file, old, new)
    for file, changes in {
        "tiny_onn_func/routing.py": ROUTING,
        "tiny_onn_func/experts.py": EXPERTS,
        "tiny_onn_func/grouped.py": GROUPED,
        "tiny_onn_func/gated.py": GATED,
        "tiny_onn_func/dispatch.py": DISPATCH,
        "tiny_onn_func/native.py": NATIVE,
        "tiny_onn_func/kernels.py": KERNELS,
        "tiny_onn_func/twins.py": TWINS,
        "tiny_onn_func/heads.py": HEADS,
        "tiny_onn_func/mapped.py": MAPPED,
        "training/cross_entropy.py": CROSS_ENTROPY,
        "tiny_onn_func/csrc/grouped.c": GROUPED_C,
        "tiny_onn_func/csrc/norms.c": NORMS_C,
        "tiny_onn_func/csrc/losses.c": LOSSES_C,
        "tiny_onn_func/csrc/rows.c": ROWS_C,
        "tiny_onn_func/csrc/attention.c": ATTENTION_C,
        "tiny_onn_func/csrc/adamw.c": ADAMW_C,
        "training/hooks.py": HOOKS,
        "training/objectives.py": OBJECTIVES,
        "training/hyper_step.py": HYPER_STEP,
        "training/main_gradients.py": MAIN_GRADIENTS,
        "training/optim.py": OPTIM,
        "training/metrics.py": METRICS,
        "training/surprise.py": SURPRISE,
        "training/step_metrics.py": STEP_METRICS,
        "training/regenerate.py": REGENERATE,
    }.items()
    for old, new in changes
]

# Where a fault of a file is likely to show, the likeliest and cheapest first.
TESTS = {
    "tiny_onn_func/routing.py": ("dynmoe", "rules", "oracle", "surprise_calculation", "transforms"),
    "tiny_onn_func/experts.py": ("dynmoe", "surprise_calculation", "agreement", "rules"),
    "tiny_onn_func/grouped.py": ("grouped", "native", "transforms"),
    "tiny_onn_func/gated.py": ("grouped", "native", "rules", "transforms"),
    "tiny_onn_func/dispatch.py": ("grouped", "native", "transforms"),
    "tiny_onn_func/native.py": ("native", "twins", "grouped", "optim", "hyper_step", "transforms"),
    "tiny_onn_func/kernels.py": ("native", "twins", "attend"),
    "tiny_onn_func/twins.py": ("twins", "attend", "transforms"),
    "tiny_onn_func/heads.py": ("twins", "parity", "oracle"),
    "tiny_onn_func/mapped.py": ("twins", "grouped", "transforms"),
    "training/cross_entropy.py": ("twins", "optim", "hyper_step"),
    "tiny_onn_func/csrc/grouped.c": ("native",),
    "tiny_onn_func/csrc/norms.c": ("twins",),
    "tiny_onn_func/csrc/losses.c": ("twins",),
    "tiny_onn_func/csrc/rows.c": ("native", "twins"),
    "tiny_onn_func/csrc/attention.c": ("twins", "attend"),
    "tiny_onn_func/csrc/adamw.c": ("native", "transforms"),
    "training/hooks.py": ("rules", "surprise_calculation", "isolation"),
    "training/objectives.py": (
        "optim",
        "rules",
        "hyper_step",
        "metrics",
        "distill",
        "surprise_calculation",
        "isolation",
        "e2e_meta_learning",
    ),
    "training/hyper_step.py": (
        "hyper_step",
        "rules",
        "isolation",
        "dynmoe",
        "optim",
        "metrics",
        "init",
        "surprise_calculation",
        "transforms",
    ),
    "training/main_gradients.py": ("hyper_step", "rules", "distill", "surprise_calculation", "isolation", "dynmoe"),
    "training/optim.py": ("optim", "init", "hyper_step", "transforms", "isolation"),
    "training/metrics.py": ("metrics",),
    "training/surprise.py": ("rules", "surprise_calculation", "agreement", "dynmoe"),
    "training/step_metrics.py": ("hyper_step", "metrics", "surprise_calculation"),
    "training/regenerate.py": ("rules",),
}
