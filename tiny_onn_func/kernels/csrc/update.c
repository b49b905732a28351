/* What follows the pass in a hyper step: the router's loss and gradient, both updates, and the metrics. Per-token arrays are
   (L, R, T, ...), as decoder.c makes them. Numbers of a run are doubles, as Python's own; what the operations of hyper_step.py
   make as floats are floats. */

#include "kernels.h"
#include "vectors.h"

#define CHUNK 16384 /* numbers whose squares are added up together */

typedef struct {
    int64_t runs, layers, tokens, hidden, experts, slots, leaves, threads;
} Sizes;

typedef struct { /* of one run: HyperParams by their names */
    double lr, router_lr, backbone_lr_scale, weight_decay, beta1, beta2, eps, max_grad_norm, warmup_steps, total_steps, decay_steps,
        min_lr_ratio, surprise_weight, balance_weight, z_weight, bias_speed, freeze_step, surprise_until, pi_alpha, pi_gamma;
} Numbers;

typedef struct {
    const float *surprise, *features, *logits;
    const int64_t *ids; /* (L, R, T, slots), and active ones */
    const uint8_t *active;
    const int64_t *target; /* (L, R, T), and two flags of each */
    const uint8_t *informative, *tied, *real; /* real: (R, T) */
    const float *loss, *entropy;              /* (R) */
    const int64_t *targets, *correct;         /* (R) */
    const Numbers *numbers;                   /* (R) */
    const int64_t *step, *updates, *router_updates; /* (R) */
    const float *bias;                              /* (R, L, experts) */
} Inputs;

typedef struct { /* of each leaf, (R, count): the fast ones and, behind them, the router */
    const int64_t *counts, *kinds; /* kinds: BACKBONE, DECAYS or both */
    const float *const *params, *const *grads, *const *mu, *const *nu;
    float *const *new_params, *const *new_mu, *const *new_nu;
} Trees;
enum { BACKBONE = 1, DECAYS = 2 };

typedef struct {
    float *grad_router; /* (R, L, hidden, experts) */
    float *bias;        /* (R, L, experts) */
    float *metrics;     /* (METRICS, R) */
    float *load, *target_load, *expert_surprise; /* (R, L, experts) */
} Outputs;

enum {
    MAIN_LOSS, DISTILL_LOSS, ROUTER_LOSS, MAIN_ACC, GATING_ACC, GATING_TRIVIAL, SURPRISE, TAU, PI_SCORE, AVG_K, MAX_VIO, DEAD_EXPERTS,
    TIE_RATE, BALANCE_LOSS, Z_LOSS, GRAD_NORM, ROUTER_GRAD_NORM, LR, METRICS
};

/* Sums of a call over some layers of every run, for which there is memory once. */
typedef struct {
    int64_t *counts, *routed, *wanted, *sized;
    double *sizes;
    float *chance, *picked, *mass, *squares, *grad_picked, *grad_mass, *grad_squares, *grad_logits;
} Sums;

typedef struct {
    int64_t informative, hits, tied, visits, surprised, real;
    double chance, surprise;
    float picked, balance, squares;
} Totals;

static double at_least(double low, double x) { return x < low ? low : x; } /* what is no number stays */
static double at_most(double high, double x) { return x > high ? high : x; }
static float share_of(double sum, int64_t count) { return (float)sum / (float)(count < 1 ? 1 : count); }

/* Share of the peak rate: `schedule` of optim.py. */
static double schedule(const Numbers *n, int64_t step) {
    double at = (double)step, warm = at_most(1, (at + 1) / at_least(1, n->warmup_steps));
    int linear = n->decay_steps > 0;
    double start = n->warmup_steps;
    if (linear && n->total_steps - n->decay_steps > start) start = n->total_steps - n->decay_steps;
    double progress = at_most(1, at_least(0, (at - start) / at_least(1, n->total_steps - start)));
    double left = linear ? 1 - progress : 0.5 * (1 + cos(3.141592653589793 * progress));
    return n->total_steps > 0 ? warm * (n->min_lr_ratio + (1 - n->min_lr_ratio) * left) : warm;
}

static double while_learning(const Numbers *n, int64_t step) { return n->freeze_step <= 0 || (double)step < n->freeze_step; }

static float annealed(const Numbers *n, int64_t step) {
    double share = n->surprise_until > 0 ? at_least(0, 1 - (double)step / at_least(1, n->surprise_until)) : 1;
    return (float)(n->surprise_weight * share);
}

/* Euclidean norms (R) of the leaves from `first` to `end` together, in parts whose order no thread changes. */
static int norms(const Sizes *s, const Trees *t, int64_t first, int64_t end, float *result) {
    int64_t parts = 0, size = 0;
    int threads = (int)s->threads;
    for (int64_t leaf = first; leaf < end; leaf++) {
        parts += s->runs * ((t->counts[leaf] + CHUNK - 1) / CHUNK);
        size += s->runs * t->counts[leaf];
    }
    double *sums = malloc(sizeof(double) * (size_t)(parts + 1));
    if (!sums) return NO_MEMORY;
#pragma omp parallel for schedule(dynamic, PIECE(parts)) num_threads(threads) if (threads > 1 && size > SMALL)
    for (int64_t part = 0; part < parts; part++) {
        int64_t leaf = first, at = part;
        for (int64_t own; at >= (own = s->runs * ((t->counts[leaf] + CHUNK - 1) / CHUNK)); leaf++) at -= own;
        int64_t count = t->counts[leaf], pieces = (count + CHUNK - 1) / CHUNK, start = at % pieces * CHUNK;
        const float *x = t->grads[leaf] + at / pieces * count + start;
        sums[part] = dot(count - start < CHUNK ? count - start : CHUNK, x, x);
    }
    for (int64_t run = 0; run < s->runs; run++) {
        double sum = 0;
        int64_t at = 0;
        for (int64_t leaf = first; leaf < end; leaf++) {
            int64_t pieces = (t->counts[leaf] + CHUNK - 1) / CHUNK;
            for (int64_t i = 0; i < pieces; i++) sum += sums[at + run * pieces + i];
            at += s->runs * pieces;
        }
        result[run] = (float)sqrt(sum);
    }
    free(sums);
    return DONE;
}

static float clip_factor(float norm, double most) {
    float factor = (float)most / (norm + 1e-6f);
    return factor > 1 ? 1 : factor;
}

/* One update of the leaves from `first` to `end`; of each run its rate, decay, scale of gradients and number of updates. */
static int update(const Sizes *s, const Inputs *in, const Trees *t, int64_t first, int64_t end, const double *rates,
                  const double *decays, const float *scales, const int64_t *updates) {
    float *numbers = malloc(sizeof(float) * (size_t)(4 * 6 * s->runs + 1));
    const float **of_leaf = malloc(sizeof(float *) * (size_t)(end - first + 1));
    if (!numbers || !of_leaf) {
        free(numbers);
        free(of_leaf);
        return NO_MEMORY;
    }
    for (int64_t kind = 0; kind < 4; kind++)
        for (int64_t run = 0; run < s->runs; run++) {
            const Numbers *n = in->numbers + run;
            double count = (double)updates[run] + 1, root = sqrt(1 - pow(n->beta2, count));
            double rate = rates[run] * (kind & BACKBONE ? n->backbone_lr_scale : 1);
            float *to = numbers + (kind * s->runs + run) * 6;
            to[0] = scales[run];
            to[1] = (float)(1 - n->beta1);
            to[2] = (float)(1 - n->beta2);
            to[3] = (float)(n->eps * root);
            to[4] = kind & DECAYS ? (float)(1 - rate * decays[run]) : 1;
            to[5] = (float)(rate / (1 - pow(n->beta1, count)) * root);
        }
    for (int64_t leaf = first; leaf < end; leaf++) of_leaf[leaf - first] = numbers + (t->kinds[leaf] & 3) * s->runs * 6;
    adamw(end - first, s->runs, t->counts + first, of_leaf, FLT_MIN, t->params + first, t->grads + first, t->mu + first, t->nu + first,
          t->new_params + first, t->new_mu + first, t->new_nu + first, (int)s->threads);
    free(numbers);
    free(of_leaf);
    return DONE;
}

/* Sums over the tokens of `layers` layers from layer l on, of every run, and what they are to each run. */
static int add_up(const Sizes *s, const Inputs *in, const Outputs *made, const Sums *sums, int64_t l, int64_t layers, Totals *totals) {
    int64_t from = l * s->runs * s->tokens, parts = s->runs * layers;
    int threads = (int)s->threads, code;
    const float *logits = in->logits + from * s->experts;
    code = routing_sums(s->runs, layers, s->tokens, s->experts, s->slots, logits, in->surprise + from * s->experts,
                        in->ids + from * s->slots, in->active + from * s->slots, in->target + from, in->informative + from,
                        in->tied + from, in->real, sums->counts, sums->chance, sums->routed, sums->wanted, sums->sizes, sums->sized,
                        threads);
    if (code) return code;
    for (int64_t part = 0; part < parts; part++) {
        int64_t run = part / layers, at = (run * s->layers + l + part % layers) * s->experts, rows = 0, wanted = 0, highest = 0, dead = 0;
        const int64_t *routed = sums->routed + part * s->experts, *aims = sums->wanted + part * s->experts;
        Totals *all = totals + run;
        all->informative += sums->counts[part];
        all->hits += sums->counts[parts + part];
        all->tied += sums->counts[2 * parts + part];
        all->visits += sums->counts[3 * parts + part];
        all->chance += sums->chance[part];
        for (int64_t e = 0; e < s->experts; e++) {
            rows += routed[e];
            wanted += aims[e];
            dead += routed[e] == 0;
            if (routed[e] > highest) highest = routed[e];
        }
        const Numbers *n = in->numbers + run;
        float mean = 0, speed = (float)(n->bias_speed * while_learning(n, in->step[run]));
        for (int64_t e = 0; e < s->experts; e++) {
            double size = sums->sizes[part * s->experts + e];
            int64_t sized = sums->sized[part * s->experts + e];
            mean += made->load[at + e] = share_of((double)routed[e], rows);
            made->target_load[at + e] = share_of((double)aims[e], wanted);
            made->expert_surprise[at + e] = share_of(size, sized);
            all->surprise += (float)size;
            all->surprised += sized;
            int64_t above = rows - routed[e] * s->experts;
            made->bias[at + e] = in->bias[at + e] + speed * (float)((above > 0) - (above < 0));
        }
        mean /= (float)s->experts;
        made->metrics[DEAD_EXPERTS * s->runs + run] += (float)dead;
        if (mean > 0) made->metrics[MAX_VIO * s->runs + run] += (share_of((double)highest, rows) - mean) / mean / (float)s->layers;
    }
    return DONE;
}

/* The router's loss of those layers, of which the totals are known, and its gradient. */
static int router_part(const Sizes *s, const Inputs *in, const Outputs *made, const Sums *sums, const int32_t *ends, int64_t l,
                       int64_t layers, Totals *totals) {
    int64_t from = l * s->runs * s->tokens, table = s->hidden * s->experts, parts = s->runs * layers;
    int threads = (int)s->threads, code;
    const float *logits = in->logits + from * s->experts;
    code = router_sums(s->runs, layers, s->tokens, s->experts, logits, in->target + from, in->informative + from, in->real, sums->picked,
                       sums->mass, sums->squares, threads);
    if (code) return code;
    for (int64_t part = 0; part < parts; part++) {
        int64_t run = part / layers, at = (run * s->layers + l + part % layers) * s->experts;
        const Numbers *n = in->numbers + run;
        Totals *all = totals + run;
        float tokens = (float)((all->real < 1 ? 1 : all->real) * s->layers);
        float informative = (float)(all->informative < 1 ? 1 : all->informative);
        all->picked += sums->picked[part];
        all->squares += sums->squares[part];
        sums->grad_picked[part] = annealed(n, in->step[run]) / informative;
        sums->grad_squares[part] = (float)n->z_weight / tokens;
        for (int64_t e = 0; e < s->experts; e++) {
            all->balance += made->load[at + e] * sums->mass[part * s->experts + e];
            sums->grad_mass[part * s->experts + e] = (float)n->balance_weight / tokens * (float)s->experts * made->load[at + e];
        }
    }
    code = router_sums_grad(s->runs, layers, s->tokens, s->experts, logits, in->target + from, in->informative + from, in->real,
                            sums->grad_picked, sums->grad_mass, sums->grad_squares, sums->grad_logits, threads);
    if (code) return code;
    for (int64_t i = 0; i < layers && !code; i++)
        code = outer_apart(s->runs, s->tokens, 1, s->hidden, s->experts, s->tokens, in->features + (l + i) * s->runs * s->tokens * s->hidden,
                           NULL, sums->grad_logits + i * s->runs * s->tokens * s->experts, ends, made->grad_router + (l + i) * table,
                           s->layers * table, threads);
    return code;
}

static void put_metrics(const Sizes *s, const Inputs *in, const Outputs *made, int64_t run, const Totals *all) {
    float *to = made->metrics + run;
    const Numbers *n = in->numbers + run;
    int64_t runs = s->runs, visited = s->layers * all->real, tokens = visited < 1 ? 1 : visited;
    float main = share_of(in->loss[run], in->targets[run]), tau = share_of(in->entropy[run], in->targets[run]);
    float surprise = share_of(all->surprise, all->surprised), least = tau < FLT_MIN ? FLT_MIN : tau;
    to[MAIN_LOSS * runs] = main;
    to[DISTILL_LOSS * runs] = 0;
    to[ROUTER_LOSS * runs] = share_of(all->picked, all->informative);
    to[MAIN_ACC * runs] = share_of((double)in->correct[run], in->targets[run]);
    to[GATING_ACC * runs] = share_of((double)all->hits, all->informative);
    to[GATING_TRIVIAL * runs] = share_of(all->chance, all->informative);
    to[SURPRISE * runs] = surprise;
    to[TAU * runs] = tau;
    to[PI_SCORE * runs] = expf(-(float)n->pi_alpha * (main / least + (float)n->pi_gamma * surprise));
    to[AVG_K * runs] = share_of((double)all->visits, tokens);
    to[TIE_RATE * runs] = share_of((double)all->tied, tokens);
    to[BALANCE_LOSS * runs] = (float)s->experts * all->balance / (float)((all->real < 1 ? 1 : all->real) * s->layers);
    to[Z_LOSS * runs] = all->squares / (float)((all->real < 1 ? 1 : all->real) * s->layers);
    to[LR * runs] = (float)(n->lr * schedule(n, in->step[run]));
}

/* The sums, the router's gradient, and the metrics but for the norms. */
static int measure(const Sizes *s, const Inputs *in, const Outputs *made, Totals *totals) {
    int64_t layers = s->runs == 1 ? s->layers : 1, parts = s->runs * layers, wide = parts * s->experts;
    int64_t words = 4 * parts + 3 * wide, reals = 5 * parts + 2 * wide + parts * s->tokens * s->experts;
    int64_t *whole = malloc(sizeof(int64_t) * (size_t)(words + wide + s->runs));
    float *real = malloc(sizeof(float) * (size_t)(reals + 1));
    int code = whole && real ? DONE : NO_MEMORY;
    if (!code) {
        Sums sums = {
            .counts = whole, .routed = whole + 4 * parts, .wanted = whole + 4 * parts + wide, .sized = whole + 4 * parts + 2 * wide,
            .sizes = (double *)(whole + words), .chance = real, .picked = real + parts, .squares = real + 2 * parts,
            .grad_picked = real + 3 * parts, .grad_squares = real + 4 * parts, .mass = real + 5 * parts,
            .grad_mass = real + 5 * parts + wide, .grad_logits = real + 5 * parts + 2 * wide,
        };
        int32_t *ends = (int32_t *)(whole + words + wide); /* (R): every token of a run */
        for (int64_t i = 0; i < METRICS * s->runs; i++) made->metrics[i] = 0;
        for (int64_t run = 0; run < s->runs; run++) {
            ends[run] = (int32_t)s->tokens;
            totals[run] = (Totals){0};
            for (int64_t t = 0; t < s->tokens; t++) totals[run].real += in->real[run * s->tokens + t];
        }
        for (int64_t l = 0; l < s->layers && !code; l += layers) code = add_up(s, in, made, &sums, l, layers, totals);
        for (int64_t l = 0; l < s->layers && !code; l += layers) code = router_part(s, in, made, &sums, ends, l, layers, totals);
        for (int64_t run = 0; run < s->runs && !code; run++) put_metrics(s, in, made, run, totals + run);
    }
    free(whole);
    free(real);
    return code;
}

/* OUTSIDE if the target of a token that teaches is no expert, or the expert of an active slot is none. */
int finish_step(const Sizes *s, const Inputs *in, const Trees *trees, const Outputs *made) {
    Totals *totals = malloc(sizeof(Totals) * (size_t)(s->runs + 1));
    double *rates = malloc(sizeof(double) * (size_t)(s->runs + 1)), *decays = malloc(sizeof(double) * (size_t)(s->runs + 1));
    float *scales = malloc(sizeof(float) * (size_t)(s->runs + 1));
    int code = totals && rates && decays && scales ? measure(s, in, made, totals) : NO_MEMORY;
    float *norm = made->metrics + GRAD_NORM * s->runs, *router_norm = made->metrics + ROUTER_GRAD_NORM * s->runs;
    int64_t fast = s->leaves - 1;
    if (!code) code = norms(s, trees, 0, fast, norm);
    if (!code) code = norms(s, trees, fast, s->leaves, router_norm);
    for (int64_t run = 0; run < s->runs && !code; run++) {
        const Numbers *n = in->numbers + run;
        float targets = (float)(in->targets[run] < 1 ? 1 : in->targets[run]);
        norm[run] /= targets;
        scales[run] = clip_factor(norm[run], n->max_grad_norm) / targets;
        rates[run] = n->lr * schedule(n, in->step[run]);
        decays[run] = n->weight_decay;
    }
    if (!code) code = update(s, in, trees, 0, fast, rates, decays, scales, in->updates);
    for (int64_t run = 0; run < s->runs && !code; run++) {
        const Numbers *n = in->numbers + run;
        scales[run] = clip_factor(router_norm[run], n->max_grad_norm);
        rates[run] = n->router_lr * schedule(n, in->step[run]) * while_learning(n, in->step[run]);
        decays[run] = 0;
    }
    if (!code) code = update(s, in, trees, fast, s->leaves, rates, decays, scales, in->router_updates);
    free(totals);
    free(rates);
    free(decays);
    free(scales);
    return code;
}
