/* One pass through the decoder and back: the loss of a batch, its gradient in every parameter but the router's, and each row's
   surprise. It calls the kernels of the other files in the order in which the operations of decoder.py do, so that its bits are
   theirs; what it saves is the way between two kernels. Axes: runs R, layers L, tokens T = batch * seq, N = T * slots rows. */

#include "kernels.h"
#include "vectors.h"

#define PARTS 16 /* of a run's rows, whose sums are made apart */
#define ALIGNED 64

enum { NOTHING, NORMS, DOTS }; /* what is measured: ||hidden|| ||grad||, or <output, grad> */

typedef struct {
    int64_t runs, layers, batch, seq, vocab, hidden, heads, groups, dim, inner, experts, slots, least, dynamic, by_token,
        measured, masks, none, threads;
    double eps;
} Sizes;

/* Leaves (R, L, ...) and (R, ...), dense; a tied head is null. The same of gradients, those of the routers being null. */
typedef struct {
    float *embed, *input_norm, *q, *k, *v, *o, *q_norm, *k_norm, *post_norm, *router, *router_bias, *w1, *w3, *w2, *norm, *head;
} Leaves;

typedef struct {
    const int64_t *ids, *labels, *mask; /* (R, T), (R, T), (masks, T), masks being R or 1 */
    const double *budgets;              /* (R) */
    const float *cosines, *sines;       /* (seq, dim) */
} Inputs;

typedef struct {
    float *surprise, *features, *logits, *weights;           /* (L, R, T, experts), (L, R, T, hidden), (L, R, T, experts), (L, R, T, slots) */
    int64_t *ids;                                            /* (L, R, T, slots) */
    uint8_t *active, *real;                                  /* (L, R, T, slots), (R, T) */
    float *loss, *entropy;                                   /* (R): sums over the tokens that have a target */
    int64_t *targets, *correct, *nonfinite;                  /* (R): how many they are, are hit, and rows without a finite surprise */
} Outputs;

/* Of one layer, what its way back reads. */
typedef struct {
    float *x, *input_norm, *normed, *qkv_weights, *head_norms, *qkv, *q, *k, *v, *log_sums, *mixed, *after, *post_norm, *tokens,
        *gate, *up, *hidden, *y;
    int64_t *order, *inverse, *token, *expert;
    int32_t *offsets;
} Layer;

/* Memory that is given out from the front; without any, how much it would be. */
typedef struct {
    char *base;
    int64_t used, most;
} Room;

static void *take(Room *room, int64_t bytes) {
    void *place = room->base ? room->base + room->used : NULL;
    room->used += (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
    if (room->used > room->most) room->most = room->used;
    return place;
}

static float *floats(Room *room, int64_t count) { return take(room, count * (int64_t)sizeof(float)); }

/* Where everything lies for the whole pass. */
typedef struct {
    Layer *layers;
    int64_t *labels;
    int32_t *ends; /* (R): every token of a run */
    float *bias, *ones, *embedded, *x, *grad, *small;
    int64_t masks; /* of the bias */
} Plan;

static int64_t tokens_of(const Sizes *s) { return s->runs * s->batch * s->seq; }
static int64_t width_of(const Sizes *s) { return (s->heads + 2 * s->groups) * s->dim; }

static void plan_layer(const Sizes *s, Room *room, Layer *layer) {
    int64_t n = tokens_of(s), rows = n * s->slots, normed = s->heads + s->groups;
    *layer = (Layer){
        .x = floats(room, n * s->hidden), .input_norm = floats(room, s->runs * s->hidden), .normed = floats(room, n * s->hidden),
        .qkv_weights = floats(room, s->runs * s->hidden * width_of(s)), .head_norms = floats(room, s->runs * normed * s->dim),
        .qkv = floats(room, n * width_of(s)), .q = floats(room, n * s->heads * s->dim), .k = floats(room, n * s->groups * s->dim),
        .v = floats(room, n * s->groups * s->dim), .log_sums = floats(room, n * s->heads),
        .mixed = floats(room, n * s->heads * s->dim), .after = floats(room, n * s->hidden),
        .post_norm = floats(room, s->runs * s->hidden), .tokens = floats(room, n * s->hidden), .gate = floats(room, rows * s->inner),
        .up = floats(room, rows * s->inner), .hidden = floats(room, rows * s->inner), .y = floats(room, rows * s->hidden),
        .order = take(room, rows * 8), .inverse = take(room, rows * 8), .token = take(room, rows * 8),
        .expert = take(room, rows * 8), .offsets = take(room, s->runs * s->experts * 4),
    };
}

static void plan_all(const Sizes *s, Room *room, Plan *plan, Layer *layers) {
    int64_t n = tokens_of(s), square = s->seq * s->seq;
    *plan = (Plan){
        .layers = layers, .labels = take(room, n * 8), .ends = take(room, s->runs * 4),
        .bias = floats(room, s->masks * s->batch * square), .ones = floats(room, n * s->slots), .x = floats(room, n * s->hidden),
        .embedded = floats(room, s->by_token ? n * s->hidden : 0), .grad = floats(room, n * s->hidden),
        .small = floats(room, s->runs * (s->hidden > s->experts ? s->hidden : s->experts)),
    };
    for (int64_t l = 0; l < s->layers; l++) {
        Layer none;
        plan_layer(s, room, layers ? layers + l : &none);
    }
}

/* Of the way back through each half of a layer, and through the head. */
typedef struct {
    float *y, *hidden, *gate, *up, *rows, *tokens, *partial;
} BackExperts;

static BackExperts plan_experts(const Sizes *s, Room *room) {
    int64_t n = tokens_of(s), rows = n * s->slots;
    return (BackExperts){floats(room, rows * s->hidden), floats(room, rows * s->inner), floats(room, rows * s->inner),
                         floats(room, rows * s->inner), floats(room, rows * s->hidden), floats(room, n * s->hidden),
                         floats(room, s->runs * PARTS * s->hidden)};
}

typedef struct {
    float *mixed, *q, *k, *v, *qkv, *weights, *norms, *turned, *normed, *x, *partial;
} BackAttention;

static BackAttention plan_attention(const Sizes *s, Room *room) {
    int64_t n = tokens_of(s), all = s->runs * s->batch;
    return (BackAttention){floats(room, n * s->heads * s->dim),
                           floats(room, n * s->heads * s->dim),
                           floats(room, n * s->groups * s->dim),
                           floats(room, n * s->groups * s->dim),
                           floats(room, n * width_of(s)),
                           floats(room, s->runs * s->hidden * width_of(s)),
                           floats(room, all * (s->heads + s->groups) * s->dim),
                           floats(room, all * s->dim),
                           floats(room, n * s->hidden),
                           floats(room, n * s->hidden),
                           floats(room, s->runs * PARTS * s->hidden)};
}

typedef struct {
    float *norm, *normed, *logits, *grad_logits, *losses, *entropies, *log_sums, *grad_normed, *partial;
    int64_t *best;
} Head;

static Head plan_head(const Sizes *s, Room *room) {
    int64_t n = tokens_of(s);
    return (Head){floats(room, s->runs * s->hidden), floats(room, n * s->hidden), floats(room, n * s->vocab),
                  floats(room, n * s->vocab),        floats(room, n),             floats(room, n),
                  floats(room, n),                   floats(room, n * s->hidden), floats(room, s->runs * PARTS * s->hidden),
                  take(room, n * 8)};
}

/* Bytes of memory that `decoder_pass` takes. */
int64_t decoder_room(const Sizes *s) {
    Room room = {0};
    Plan plan;
    plan_all(s, &room, &plan, take(&room, s->layers * (int64_t)sizeof(Layer)));
    int64_t used = room.used;
    plan_experts(s, &room), room.used = used;
    plan_attention(s, &room), room.used = used;
    plan_head(s, &room);
    return room.most;
}

/* Forward --------------------------------------------------------------------------------------------------------------- */

/* Layer l's part of a leaf (R, L, size), one run behind the other. */
static void gather(const Sizes *s, const float *leaf, int64_t l, int64_t size, float *to) {
    for (int64_t run = 0; run < s->runs; run++) copy(to + run * size, leaf + (run * s->layers + l) * size, size);
}

/* And back: the parts of runs that lie `apart` floats from one to the next. */
static void put_back(const Sizes *s, const float *from, int64_t apart, float *leaf, int64_t l, int64_t size) {
    for (int64_t run = 0; run < s->runs; run++) copy(leaf + (run * s->layers + l) * size, from + run * apart, size);
}

static void add(int64_t count, const float *x, const float *y, float *out, int threads) {
#pragma omp parallel for schedule(dynamic, PIECE(count)) num_threads(threads) if (threads > 1 && count > SMALL)
    for (int64_t i = 0; i < count; i++) out[i] = x[i] + y[i];
}

/* Each run's tokens times its weights (in, out), which lie `apart` floats from one run to the next, or (out, in) transposed. */
static int dense(const Sizes *s, const Plan *plan, int64_t in, int64_t out, const float *x, const float *weights, int64_t apart,
                 float *result, int transposed) {
    int64_t n = s->batch * s->seq;
    return grouped_matmul(s->runs, n, 1, in, out, n, x, NULL, weights, NULL, NULL, apart, plan->ends, result, transposed,
                          (int)s->threads);
}

/* The gradient of those weights. */
static int dense_outer(const Sizes *s, const Plan *plan, int64_t in, int64_t out, const float *x, const float *grad, float *result,
                       int64_t apart) {
    int64_t n = s->batch * s->seq;
    return outer_apart(s->runs, n, 1, in, out, n, x, NULL, grad, plan->ends, result, apart, (int)s->threads);
}

/* Labels of real tokens, what is real, the bias of the attention, and the embedding. */
static int begin(const Sizes *s, const Leaves *p, const Inputs *in, Plan *plan, const Outputs *made) {
    int64_t length = s->batch * s->seq, square = s->seq * s->seq;
    int whole = 1, outside = 0;
    for (int64_t t = 0; t < s->masks * length; t++) {
        whole &= in->mask[t] == 1;
        outside |= in->mask[t] < 0;
    }
    for (int64_t run = 0; run < s->runs; run++) plan->ends[run] = (int32_t)length, made->nonfinite[run] = 0;
    for (int64_t t = 0; t < s->runs * length; t++) {
        made->real[t] = in->mask[s->masks == 1 ? t % length : t] != 0;
        plan->labels[t] = made->real[t] ? in->labels[t] : s->none;
    }
    for (int64_t t = 0; t < s->runs * length * s->slots; t++) plan->ones[t] = 1;
    plan->masks = whole ? 1 : s->masks * s->batch;
    for (int64_t b = 0; b < plan->masks; b++)
        for (int64_t i = 0; i < s->seq; i++)
            for (int64_t j = 0; j < s->seq; j++) {
                const int64_t *mask = in->mask + b * s->seq;
                int seen = j <= i && mask[j] != 0 && (mask[j] == mask[i] || mask[i] == 0);
                plan->bias[b * square + i * s->seq + j] = seen ? 0 : -FLT_MAX;
            }
    for (int64_t t = 0; t < s->runs * length; t++) {
        if (is_index(in->ids[t], s->vocab))
            copy(plan->layers[0].x + t * s->hidden, p->embed + (t / length * s->vocab + in->ids[t]) * s->hidden, s->hidden);
        else outside = 1;
    }
    if (s->by_token && !outside) {
        for (int64_t i = 0; i < s->runs * s->hidden; i++) plan->small[i] = 1;
        rms_norm(s->runs, length, s->hidden, (float)s->eps, plan->layers[0].x, plan->small, plan->embedded, (int)s->threads);
    }
    return outside ? OUTSIDE : DONE;
}

/* after = x + attention(norm(x)). */
static int attention_forward(const Sizes *s, const Leaves *p, const Inputs *in, Plan *plan, int64_t l) {
    Layer *a = plan->layers + l;
    int64_t n = s->batch * s->seq, inner = s->heads * s->dim, keys = s->groups * s->dim, width = width_of(s);
    int threads = (int)s->threads, code;
    float eps = (float)s->eps, root = (float)sqrt((double)s->dim);
    gather(s, p->input_norm, l, s->hidden, a->input_norm);
    rms_norm(s->runs, n, s->hidden, eps, a->x, a->input_norm, a->normed, threads);
    for (int64_t run = 0; run < s->runs; run++) {
        int64_t at = run * s->layers + l;
        for (int64_t i = 0; i < s->hidden; i++) {
            float *to = a->qkv_weights + (run * s->hidden + i) * width;
            copy(to, p->q + (at * s->hidden + i) * inner, inner);
            copy(to + inner, p->k + (at * s->hidden + i) * keys, keys);
            copy(to + inner + keys, p->v + (at * s->hidden + i) * keys, keys);
        }
        float *norms = a->head_norms + run * (s->heads + s->groups) * s->dim;
        for (int64_t h = 0; h < s->heads + s->groups; h++)
            for (int64_t j = 0; j < s->dim; j++) /* a few numbers to scale, where the scores are many */
                norms[h * s->dim + j] = h < s->heads ? p->q_norm[at * s->dim + j] / root : p->k_norm[at * s->dim + j];
    }
    if ((code = dense(s, plan, s->hidden, width, a->normed, a->qkv_weights, s->hidden * width, a->qkv, 0))) return code;
    split_heads(s->runs, s->batch, s->seq, s->heads, s->groups, s->dim, eps, a->qkv, a->head_norms, in->cosines, in->sines, a->q, a->k,
                a->v, threads);
    code = attention(s->runs * s->batch, s->groups, s->heads / s->groups, s->seq, s->dim, a->q, a->k, a->v, plan->bias, plan->masks,
                     a->mixed, a->log_sums, threads);
    if (code) return code;
    code = dense(s, plan, inner, s->hidden, a->mixed, p->o + l * inner * s->hidden, s->layers * inner * s->hidden, plan->grad, 0);
    add(tokens_of(s) * s->hidden, a->x, plan->grad, a->after, threads);
    return code;
}

/* out = after + experts(norm(after)), each token's experts being those that the router chooses. */
static int experts_forward(const Sizes *s, const Leaves *p, const Inputs *in, Plan *plan, const Outputs *made, int64_t l, float *out) {
    Layer *a = plan->layers + l;
    int64_t n = s->batch * s->seq, rows = n * s->slots, all = s->runs * n, apart = s->layers * s->experts * s->hidden * s->inner;
    int64_t expert = s->experts * s->hidden * s->inner, table = s->hidden * s->experts;
    int threads = (int)s->threads, code;
    float *features = made->features + l * all * s->hidden, *logits = made->logits + l * all * s->experts;
    float *weights = made->weights + l * all * s->slots;
    int64_t *ids = made->ids + l * all * s->slots;
    uint8_t *active = made->active + l * all * s->slots;
    gather(s, p->post_norm, l, s->hidden, a->post_norm);
    rms_norm(s->runs, n, s->hidden, (float)s->eps, a->after, a->post_norm, a->tokens, threads);
    copy(features, s->by_token ? plan->embedded : a->tokens, all * s->hidden);
    if ((code = dense(s, plan, s->hidden, s->experts, features, p->router + l * table, s->layers * table, logits, 0))) return code;
    gather(s, p->router_bias, l, s->experts, plan->small);
    code = choose(s->runs, n, s->experts, s->slots, s->least, (int)s->dynamic, logits, plan->small, in->budgets, made->real, weights,
                  ids, active, threads);
    if (code) return code;
    code = sort_rows(s->runs, rows, s->experts, ids, active, a->order, a->inverse, a->expert, a->offsets, threads);
    if (code) return code;
    for (int64_t i = 0; i < all * s->slots; i++) { /* tokens of a run; rows of all runs */
        a->token[i] = a->order[i] / s->slots;
        a->order[i] += i / rows * rows;
        a->inverse[i] += i / rows * rows;
    }
    const float *gate_up[2] = {p->w1, p->w3};
    float *results[2] = {a->gate, a->up};
    for (int i = 0; i < 2; i++) {
        code = grouped_matmul(s->runs, rows, s->experts, s->hidden, s->inner, n, a->tokens, a->token, gate_up[i] + l * expert, NULL, NULL,
                              apart, a->offsets, results[i], 0, threads);
        if (code) return code;
    }
    swiglu(all * s->slots * s->inner, a->gate, a->up, a->hidden, threads);
    code = grouped_matmul(s->runs, rows, s->experts, s->inner, s->hidden, rows, a->hidden, NULL, p->w2 + l * expert, NULL, NULL, apart,
                          a->offsets, a->y, 0, threads);
    if (code) return code;
    code = combined_rows(all, s->hidden, s->slots, all * s->slots, a->y, weights, a->inverse, plan->grad, threads);
    add(all * s->hidden, a->after, plan->grad, out, threads);
    return code;
}

/* The head, the loss, and the way back through both: plan->grad is then that of the last layer's output. */
static int head_and_loss(const Sizes *s, const Leaves *p, Room *room, Plan *plan, const Leaves *grads, const Outputs *made) {
    Head h = plan_head(s, room);
    int64_t n = s->batch * s->seq, all = s->runs * n, size = s->vocab * s->hidden, parts = n / PARTS < PARTS ? n / PARTS : PARTS;
    int threads = (int)s->threads, code;
    const float *head = p->head ? p->head : p->embed;
    if (parts < 1) parts = 1;
    rms_norm(s->runs, n, s->hidden, (float)s->eps, plan->x, p->norm, h.normed, threads);
    if ((code = dense(s, plan, s->hidden, s->vocab, h.normed, head, size, h.logits, !p->head))) return code;
    code = cross_entropy(all, s->vocab, s->none, h.logits, plan->labels, h.losses, h.entropies, h.best, h.log_sums, threads);
    if (code) return code;
    for (int64_t run = 0; run < s->runs; run++) {
        double loss = 0, entropy = 0;
        int64_t targets = 0, correct = 0;
        for (int64_t t = run * n; t < (run + 1) * n; t++) {
            loss += h.losses[t];
            entropy += h.entropies[t];
            targets += plan->labels[t] != s->none;
            correct += plan->labels[t] == h.best[t];
        }
        made->loss[run] = (float)loss, made->entropy[run] = (float)entropy;
        made->targets[run] = targets, made->correct[run] = correct;
    }
    code = cross_entropy_grad(all, s->vocab, s->none, plan->ones, h.logits, plan->labels, h.best, h.log_sums, h.grad_logits, threads);
    if (code) return code;
    if ((code = dense(s, plan, s->vocab, s->hidden, h.grad_logits, head, size, h.grad_normed, !!p->head))) return code;
    if (p->head) code = dense_outer(s, plan, s->hidden, s->vocab, h.normed, h.grad_logits, grads->head, size);
    else code = dense_outer(s, plan, s->vocab, s->hidden, h.grad_logits, h.normed, grads->embed, size);
    rms_norm_grad(s->runs, n, s->hidden, parts, (float)s->eps, plan->x, p->norm, h.grad_normed, plan->grad, h.partial, threads);
    for (int64_t run = 0; run < s->runs; run++) copy(grads->norm + run * s->hidden, h.partial + run * parts * s->hidden, s->hidden);
    return code;
}

/* Backward -------------------------------------------------------------------------------------------------------------- */

/* From plan->grad, that of the layer's output, to that of `after`. */
static int experts_backward(const Sizes *s, const Leaves *p, Room *room, Plan *plan, const Leaves *grads, const Outputs *made, int64_t l) {
    BackExperts b = plan_experts(s, room);
    Layer *a = plan->layers + l;
    int64_t n = s->batch * s->seq, rows = n * s->slots, all = s->runs * n, expert = s->experts * s->hidden * s->inner;
    int64_t apart = s->layers * expert, parts = n / PARTS < PARTS ? n / PARTS : PARTS;
    int threads = (int)s->threads, code;
    const float *weights = made->weights + l * all * s->slots;
    if (parts < 1) parts = 1;
    if ((code = scaled_rows(all * s->slots, s->hidden, s->slots, all, plan->grad, weights, a->order, b.y, threads))) return code;
    if (s->measured != NOTHING) {
        int dots = s->measured == DOTS;
        float *surface = made->surprise + l * all * s->experts;
        code = spread_surprise(s->runs, rows, dots ? s->hidden : s->inner, s->hidden, n, s->experts, dots, dots ? a->y : a->hidden, b.y,
                               a->token, a->expert, surface, threads);
        if (code) return code;
        for (int64_t i = 0; i < all * s->slots; i++) { /* ids of active slots are experts: sort_rows has looked */
            int64_t at = l * all * s->slots + i;
            if (made->active[at]) made->nonfinite[i / rows] += !(fabsf(surface[i / s->slots * s->experts + made->ids[at]]) < INFINITY);
        }
    }
    code = grouped_matmul(s->runs, rows, s->experts, s->hidden, s->inner, rows, b.y, NULL, p->w2 + l * expert, NULL, NULL, apart,
                          a->offsets, b.hidden, 1, threads);
    if (code) return code;
    code = outer_apart(s->runs, rows, s->experts, s->inner, s->hidden, rows, a->hidden, NULL, b.y, a->offsets, grads->w2 + l * expert,
                       apart, threads);
    if (code) return code;
    swiglu_grad(all * s->slots * s->inner, b.hidden, a->gate, a->up, b.gate, b.up, threads);
    code = grouped_matmul(s->runs, rows, s->experts, s->inner, s->hidden, rows, b.gate, NULL, p->w1 + l * expert, b.up,
                          p->w3 + l * expert, apart, a->offsets, b.rows, 1, threads);
    if (code) return code;
    if ((code = combined_rows(all, s->hidden, s->slots, all * s->slots, b.rows, plan->ones, a->inverse, b.tokens, threads))) return code;
    float *results[2] = {grads->w1 + l * expert, grads->w3 + l * expert}, *slopes[2] = {b.gate, b.up};
    for (int i = 0; i < 2; i++) {
        code = outer_apart(s->runs, rows, s->experts, s->hidden, s->inner, n, a->tokens, a->token, slopes[i], a->offsets, results[i], apart,
                           threads);
        if (code) return code;
    }
    float *grad_x = b.y; /* as large, and no more read */
    rms_norm_grad(s->runs, n, s->hidden, parts, (float)s->eps, a->after, a->post_norm, b.tokens, grad_x, b.partial, threads);
    put_back(s, b.partial, parts * s->hidden, grads->post_norm, l, s->hidden);
    add(all * s->hidden, plan->grad, grad_x, plan->grad, threads);
    return DONE;
}

/* From plan->grad, that of `after`, to that of the layer's input. */
static int attention_backward(const Sizes *s, const Leaves *p, const Inputs *in, Room *room, Plan *plan, const Leaves *grads, int64_t l) {
    BackAttention b = plan_attention(s, room);
    Layer *a = plan->layers + l;
    int64_t n = s->batch * s->seq, inner = s->heads * s->dim, keys = s->groups * s->dim, width = width_of(s), normed = s->heads + s->groups;
    int64_t size = inner * s->hidden, parts = n / PARTS < PARTS ? n / PARTS : PARTS;
    int threads = (int)s->threads, code;
    float root = (float)sqrt((double)s->dim);
    if (parts < 1) parts = 1;
    if ((code = dense(s, plan, s->hidden, inner, plan->grad, p->o + l * size, s->layers * size, b.mixed, 1))) return code;
    if ((code = dense_outer(s, plan, inner, s->hidden, a->mixed, plan->grad, grads->o + l * size, s->layers * size))) return code;
    code = attention_grad(s->runs * s->batch, s->groups, s->heads / s->groups, s->seq, s->dim, a->q, a->k, a->v, plan->bias, plan->masks,
                          a->mixed, a->log_sums, b.mixed, b.q, b.k, b.v, threads);
    if (code) return code;
    split_heads_grad(s->runs, s->batch, s->seq, s->heads, s->groups, s->dim, (float)s->eps, a->qkv, a->head_norms, in->cosines, in->sines,
                     b.q, b.k, b.v, b.qkv, b.norms, b.turned, threads);
    if ((code = dense(s, plan, width, s->hidden, b.qkv, a->qkv_weights, s->hidden * width, b.normed, 1))) return code;
    if ((code = dense_outer(s, plan, s->hidden, width, a->normed, b.qkv, b.weights, s->hidden * width))) return code;
    for (int64_t run = 0; run < s->runs; run++) {
        int64_t at = run * s->layers + l;
        for (int64_t i = 0; i < s->hidden; i++) {
            const float *from = b.weights + (run * s->hidden + i) * width;
            copy(grads->q + (at * s->hidden + i) * inner, from, inner);
            copy(grads->k + (at * s->hidden + i) * keys, from + inner, keys);
            copy(grads->v + (at * s->hidden + i) * keys, from + inner + keys, keys);
        }
        float *sums = b.norms + run * s->batch * normed * s->dim; /* of the first of a run's batches, then of all */
        for (int64_t i = 1; i < s->batch; i++)
            for (int64_t j = 0; j < normed * s->dim; j++) sums[j] += sums[i * normed * s->dim + j];
        for (int64_t j = 0; j < s->dim; j++) {
            float q = 0, k = 0;
            for (int64_t h = 0; h < s->heads; h++) q += sums[h * s->dim + j];
            for (int64_t h = s->heads; h < normed; h++) k += sums[h * s->dim + j];
            grads->q_norm[at * s->dim + j] = q / root;
            grads->k_norm[at * s->dim + j] = k;
        }
    }
    rms_norm_grad(s->runs, n, s->hidden, parts, (float)s->eps, a->x, a->input_norm, b.normed, b.x, b.partial, threads);
    put_back(s, b.partial, parts * s->hidden, grads->input_norm, l, s->hidden);
    add(tokens_of(s) * s->hidden, plan->grad, b.x, plan->grad, threads);
    return DONE;
}

/* What has flowed back to the tokens, added to their rows of the embedding; with a head of its own that is all. */
static void embedding_backward(const Sizes *s, const Leaves *p, const Inputs *in, const Plan *plan, const Leaves *grads) {
    int64_t n = s->batch * s->seq, size = s->vocab * s->hidden;
    int threads = (int)s->threads;
#pragma omp parallel for schedule(dynamic, PIECE(s->runs)) num_threads(threads) if (threads > 1 && s->runs > 1 && s->runs * size > SMALL)
    for (int64_t run = 0; run < s->runs; run++) {
        if (p->head) clear(grads->embed + run * size, size);
        for (int64_t t = run * n; t < (run + 1) * n; t++) {
            float *to = grads->embed + run * size + in->ids[t] * s->hidden; /* an index: `begin` has looked */
            for (int64_t j = 0; j < s->hidden; j++) to[j] += plan->grad[t * s->hidden + j];
        }
    }
}

/* `base` is memory of `decoder_room` bytes. OUTSIDE if an id or a label is none of the vocabulary (a label may be `none`), or a
   number of the mask is negative. */
int decoder_pass(const Sizes *s, const Leaves *p, const Inputs *in, const Leaves *grads, const Outputs *made, void *base) {
    Room room = {.base = base};
    Plan plan;
    Layer *layers = take(&room, s->layers * (int64_t)sizeof(Layer));
    plan_all(s, &room, &plan, layers);
    int64_t used = room.used;
    int code = begin(s, p, in, &plan, made);
    for (int64_t l = 0; l < s->layers && !code; l++) {
        code = attention_forward(s, p, in, &plan, l);
        if (!code) code = experts_forward(s, p, in, &plan, made, l, l + 1 < s->layers ? layers[l + 1].x : plan.x);
    }
    if (!code) code = head_and_loss(s, p, &room, &plan, grads, made);
    for (int64_t l = s->layers - 1; l >= 0 && !code; l--) {
        room.used = used;
        code = experts_backward(s, p, &room, &plan, grads, made, l);
        room.used = used;
        if (!code) code = attention_backward(s, p, in, &room, &plan, grads, l);
    }
    if (!code) embedding_backward(s, p, in, &plan, grads);
    return code;
}
