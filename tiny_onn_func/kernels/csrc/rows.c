/* What an expert layer does beside its products: the gated activation, rows sorted, combined and
   sent back. */

#include "vectors.h"

/* out = silu(gate) * up, of `count` numbers. */
void swiglu(int64_t count, const float *gate, const float *up, float *restrict out, int threads) {
#pragma omp parallel for schedule(dynamic, PIECE(count)) num_threads(threads) if (threads > 1 && count > SMALL)
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1 + expo(-gate[i])) * up[i];
}

/* Its gradients in gate and up. */
void swiglu_grad(int64_t count, const float *grad, const float *gate, const float *up, float *restrict grad_gate,
                 float *restrict grad_up, int threads) {
#pragma omp parallel for schedule(dynamic, PIECE(count)) num_threads(threads) if (threads > 1 && count > SMALL)
    for (int64_t i = 0; i < count; i++) {
        float x = gate[i], slope = grad[i], share = 1 / (1 + expo(-x)), other = slope * up[i] * share;
        grad_up[i] = slope * x * share;
        grad_gate[i] = other * fused(x, 1 - share, 1);
    }
}

/* rows (n, dim): the token order[i] / slots of x (tokens, dim), times weights[order[i]]: what a weighted sum sends back to its
   terms. OUTSIDE if an order is none of tokens * slots. */
int scaled_rows(int64_t n, int64_t dim, int64_t slots, int64_t tokens, const float *x, const float *weights,
                const int64_t *order, float *restrict rows, int threads) {
    if (!are_indices(n, order, tokens * slots)) return OUTSIDE;
#pragma omp parallel for schedule(dynamic, PIECE(n)) num_threads(threads) if (threads > 1 && n * dim > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *from = x + order[i] / slots * dim;
        float weight = weights[order[i]];
        for (int64_t j = 0; j < dim; j++) rows[i * dim + j] = from[j] * weight;
    }
    return DONE;
}

/* out (n, dim): the sum over slots m of weights[t, m] times row inverse[t, m] of y (rows, dim). OUTSIDE if there is no such
   row. */
int combined_rows(int64_t n, int64_t dim, int64_t slots, int64_t rows, const float *y, const float *weights,
                  const int64_t *inverse, float *restrict out, int threads) {
    if (!are_indices(n * slots, inverse, rows)) return OUTSIDE;
#pragma omp parallel for schedule(dynamic, PIECE(n)) num_threads(threads) if (threads > 1 && n * slots * dim > SMALL)
    for (int64_t t = 0; t < n; t++) {
        float *to = out + t * dim;
        clear(to, dim);
        for (int64_t m = t * slots; m < (t + 1) * slots; m++) {
            const float *from = y + inverse[m] * dim;
            float weight = weights[m];
            for (int64_t j = 0; j < dim; j++) to[j] = fused(weight, from[j], to[j]);
        }
    }
    return DONE;
}

/* Rows of each run sorted by expert, stably, inactive ones last: `order` of the (token, slot) pairs, its inverse, each row's
   expert (`experts` where inactive), and `offsets` (runs, experts). OUTSIDE if an active id is no expert. */
int sort_rows(int64_t runs, int64_t n, int64_t experts, const int64_t *ids, const uint8_t *active, int64_t *restrict order,
              int64_t *restrict inverse, int64_t *restrict expert, int32_t *restrict offsets, int threads) {
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(runs)) num_threads(threads) reduction(| : outside) \
    if (threads > 1 && runs > 1 && runs * n > SMALL)
    for (int64_t run = 0; run < runs; run++) {
        int32_t *ends = offsets + run * experts; /* first the counts, then where the next row goes, then the ends */
        int64_t first = run * n, last = 0, start = 0, strangers = 0;
        for (int64_t e = 0; e < experts; e++) ends[e] = 0;
        for (int64_t i = first; i < first + n; i++) {
            if (!active[i]) continue;
            if (is_index(ids[i], experts)) ends[ids[i]]++;
            else strangers++;
        }
        if (strangers) {
            outside = 1;
            continue;
        }
        for (int64_t e = 0; e < experts; e++) {
            int32_t count = ends[e];
            ends[e] = (int32_t)start;
            start += count;
        }
        last = start;
        for (int64_t i = first; i < first + n; i++) {
            int64_t at = active[i] ? ends[ids[i]]++ : last++; /* below n: each of the n rows was counted once */
            order[first + at] = i - first;
            inverse[i] = at;
            expert[first + at] = active[i] ? ids[i] : experts;
        }
    }
    return outside ? OUTSIDE : DONE;
}
