/* Causal attention and its gradients. */

#include "products.h"

/* A row's length up to whole vectors. */
INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* A row of `n` scores, with room for whole vectors, to e^(score + mask - from), zeros behind them; where that is not
   `known`, to shares that sum to 1, and `from` becomes the logarithm of the sum. Where the mask is the least number the share
   is 0, whatever the score is. Where nothing is left all shares are 0. */
INLINE void softmax(int64_t n, float *p, const float *mask, float *from, int known) {
    vec most = every(-INFINITY), sum = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        vec bias = n - j < LANES ? part(mask + j, (int)(n - j)) : *(const vec *)(mask + j), x = *(vec *)(p + j) + bias;
        x = either(bias <= -FLT_MAX, every(-INFINITY), x);
        if (n - j < LANES) x = either(places() < (int)(n - j), x, every(-INFINITY));
        most = either(most > x, most, x);
        *(vec *)(p + j) = x;
    }
    float least = known ? *from : largest_of(most);
    if (least == -INFINITY) least = 0; /* nothing is left: e^-infinity, not what is no number */
    for (int64_t j = 0; j < n; j += LANES) {
        vec x = expo_of(*(vec *)(p + j) - least);
        if (n - j < LANES) x = either(places() < (int)(n - j), x, (vec){0});
        sum += x;
        *(vec *)(p + j) = x;
    }
    float all = total_of(sum), share = all == 0 ? 0 : 1 / all;
    if (known && all > 0.99999f && all < 1.00001f) return; /* beside a score of 1e4 the logarithm of a sum has few digits left, at 1e8 none */
    if (!known) *from = least + logf(all);
    for (int64_t j = 0; j < n; j += LANES) *(vec *)(p + j) *= share;
}

/* Probabilities (high x width, rows padded(seq) apart) of queries first .. first + high: softmax(q k^T + bias), zeros on
   later keys; `keys` is k turned. If `log_sums` are known they are used, else they are made. */
INLINE void probabilities(int64_t seq, int64_t dim, int64_t first, int64_t high, int64_t width, const float *q,
                          const float *keys, const float *bias, float *p, float *log_sums, int known) {
    product(high, width, dim, q + first * dim, dim, 1, keys, seq, p, padded(seq), NEW);
    for (int64_t i = first; i < first + high; i++, p += padded(seq)) {
        softmax(i + 1, p, bias + i * seq, log_sums + i, known);
        for (int64_t j = padded(i + 1); j < width; j++) p[j] = 0;
    }
}

/* Keys that the queries before `end` may see, up to whole vectors. */
INLINE int64_t seen(int64_t end, int64_t seq) {
    int64_t width = (end + WIDE * LANES - 1) / (WIDE * LANES) * (WIDE * LANES);
    return width < seq ? width : seq;
}

/* out (high x dim, rows `ldc` apart) = p v for queries first .. first + high, of the values alone that a query sees: of the
   others one may be no number, and 0 times it is none. The sums are those of `product`, bit for bit. */
INLINE void seen_product(int64_t seq, int64_t dim, int64_t first, int64_t high, const float *p, const float *v,
                         const float *bias, float *out, int64_t ldc) {
    for (int64_t i = first; i < first + high; i++, p += padded(seq), out += ldc)
        for (int64_t d = 0; d < dim; d++) {
            float sum = 0;
            for (int64_t j = 0; j <= i; j++)
                if (!(bias[i * seq + j] <= -FLT_MAX)) sum = fused(p[j], v[j * dim + d], sum);
            out[d] = sum;
        }
}

/* Where query i of head h of all batches' heads stands in (batch, seq, heads, dim). */
INLINE int64_t place(int64_t h, int64_t i, int64_t heads, int64_t seq, int64_t dim) {
    return ((h / heads * seq + i) * heads + h % heads) * dim;
}

/* out (batch, seq, groups, share, dim) = softmax(q k^T + bias) v, causal, and the log of each softmax's sum; q (batch,
   groups, share, seq, dim), k and v (batch, groups, seq, dim), bias (masks, seq, seq) for batches 0 to masks - 1,
   and again from 0 on. NO_MEMORY if there is none. */
int attention(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q, const float *k,
              const float *v, const float *bias, int64_t masks, float *out, float *log_sums, int threads) {
    int64_t heads = groups * share;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && batch * groups * seq * seq * dim > SMALL)
    for (int64_t t = 0; t < batch * groups; t++) {
        float *keys = malloc(sizeof(float) * (size_t)(seq * dim + HIGH * padded(seq))), *p = keys + seq * dim;
        if (!keys) {
#pragma omp atomic write
            failed = NO_MEMORY;
            continue;
        }
        const float *mask = bias + t / groups % masks * seq * seq;
        int whole = are_finite(seq * dim, v + t * seq * dim);
        turn(seq, dim, k + t * seq * dim, keys);
        for (int64_t h = t * share; h < (t + 1) * share; h++)
            for (int64_t i = 0; i < seq; i += HIGH) {
                int64_t high = seq - i < HIGH ? seq - i : HIGH, width = seen(i + high, seq);
                probabilities(seq, dim, i, high, width, q + h * seq * dim, keys, mask, p, log_sums + h * seq, 0);
                float *to = out + place(h, i, heads, seq, dim);
                if (whole) product(high, dim, i + high, p, padded(seq), 1, v + t * seq * dim, dim, to, heads * dim, NEW);
                else seen_product(seq, dim, i, high, p, v + t * seq * dim, mask, to, heads * dim);
            }
        free(keys);
    }
    return failed;
}

/* Its gradients in q, k and v. */
int attention_grad(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q,
                   const float *k, const float *v, const float *bias, int64_t masks, const float *out, float *log_sums,
                   const float *grad, float *grad_q, float *grad_k, float *grad_v, int threads) {
    int64_t heads = groups * share, row = padded(seq), token = heads * dim; /* floats from one token of out and grad to the next */
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && batch * groups * seq * seq * dim > SMALL)
    for (int64_t t = 0; t < batch * groups; t++) {
        float *keys = malloc(sizeof(float) * (size_t)(2 * seq * dim + 2 * seq * row));
        if (!keys) {
#pragma omp atomic write
            failed = NO_MEMORY;
            continue;
        }
        float *values = keys + seq * dim, *p = values + seq * dim, *s = p + seq * row; /* s: slope in the scores */
        const float *mask = bias + t / groups % masks * seq * seq;
        turn(seq, dim, k + t * seq * dim, keys);
        turn(seq, dim, v + t * seq * dim, values);
        for (int64_t h = t * share; h < (t + 1) * share; h++) {
            const float *head = q + h * seq * dim, *up = grad + place(h, 0, heads, seq, dim);
            const float *made = out + place(h, 0, heads, seq, dim);
            for (int64_t i = 0; i < seq; i += HIGH) {
                int64_t high = seq - i < HIGH ? seq - i : HIGH, width = seen(i + high, seq);
                probabilities(seq, dim, i, high, width, head, keys, mask, p + i * row, log_sums + h * seq, 1);
                product(high, width, dim, up + i * token, token, 1, values, seq, s + i * row, row, NEW);
                for (int64_t r = i; r < i + high; r++) {
                    float mean = dot(dim, up + r * token, made + r * token);
                    for (int64_t j = 0; j <= r; j++) { /* a share of 1 stays 1: the difference has only the rounding of two sums */
                        float slope = p[r * row + j] * (s[r * row + j] - mean);
                        s[r * row + j] = p[r * row + j] == 1 ? 0 : slope;
                    }
                    for (int64_t j = r + 1; j < width; j++) s[r * row + j] = 0;
                }
                product(high, dim, i + high, s + i * row, row, 1, k + t * seq * dim, dim, grad_q + (h * seq + i) * dim, dim,
                        NEW);
            }
            for (int64_t j = 0; j < seq; j += HIGH) { /* keys are seen by the queries from j on */
                int64_t high = seq - j < HIGH ? seq - j : HIGH, at = j * row + j, depth = seq - j;
                int how = h > t * share ? MORE : NEW;
                product(high, dim, depth, s + at, 1, row, head + j * dim, dim, grad_k + (t * seq + j) * dim, dim, how);
                product(high, dim, depth, p + at, 1, row, up + j * token, token, grad_v + (t * seq + j) * dim, dim, how);
            }
        }
        free(keys);
    }
    return failed;
}
