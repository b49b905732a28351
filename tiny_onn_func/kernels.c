/* Rows times experts, and the optimizer's step, in float32 on a CPU: what tiny_onn_func/native.py compiles and calls.

   Every output element is one sum, made by one thread in the order of its terms, so the bits depend neither on the
   number of threads nor on what else is in the batch. All arrays are dense and row-major. `offsets` (runs, experts)
   holds, for each run, the row behind the last one of each expert; rows behind the last offset belong to nobody. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16 /* floats in a vector */
#define HIGH 8   /* rows of a tile; HIGH * WIDE sums stay in registers */
#elif defined(__AVX2__)
#define LANES 8
#define HIGH 6
#else
#define LANES 4
#define HIGH 8
#endif
#define WIDE 2
#define BLOCK (8 * HIGH) /* rows of an expert that one thread takes at a time */
#define CHUNK 16384      /* parameters that one thread takes at a time */
#define SMALL 100000     /* multiplications that are not worth a second thread */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* c (high x wide vectors) = sum over k of a[i][k * step] * b[k], plus c if `more`; sizes are known to the compiler, sums are registers. */
INLINE void tile(const int high, const int wide, int64_t depth, const float *const a[], int64_t step, const float *b,
                 int64_t ldb, float *c, int64_t ldc, int more) {
    vec sum[HIGH][WIDE];
    const float *row[HIGH];
#pragma GCC unroll 8
    for (int i = 0; i < high; i++) {
        row[i] = a[i];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sum[i][j] = more ? *(const vec *)(c + i * ldc + j * LANES) : (vec){0};
    }
    for (int64_t k = 0; k < depth; k++, b += ldb) {
        vec right[WIDE];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) right[j] = *(const vec *)(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < high; i++) {
            float left = row[i][k * step];
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < high; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) *(vec *)(c + i * ldc + j * LANES) = sum[i][j];
}

#define CASE(n)                                       \
    case n:                                           \
        tile(n, wide, depth, a, step, b, ldb, c, ldc, more); \
        break;

INLINE void tile_of(int high, const int wide, int64_t depth, const float *const a[], int64_t step, const float *b,
                    int64_t ldb, float *c, int64_t ldc, int more) {
    switch (high) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if HIGH == 8
        CASE(7) CASE(8)
#endif
    }
}

/* c (n x m) = a (n x depth) b (depth x m), plus c if `more`, with a[i][k] at a[i * row + k * step]. */
static void product(int64_t n, int64_t m, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,
                    int64_t ldb, float *c, int64_t ldc, int more) {
    for (int64_t j = 0; j < m;) {
        int wide = m - j >= WIDE * LANES ? WIDE : m - j >= LANES;
        for (int64_t i = 0; i < n; i += HIGH) {
            int high = n - i < HIGH ? (int)(n - i) : HIGH;
            const float *rows[HIGH];
            for (int r = 0; r < high; r++) rows[r] = a + (i + r) * row;
            float *out = c + i * ldc + j;
            if (wide == WIDE) tile_of(high, WIDE, depth, rows, step, b + j, ldb, out, ldc, more);
            else if (wide) tile_of(high, 1, depth, rows, step, b + j, ldb, out, ldc, more);
            else
                for (int r = 0; r < high; r++)
                    for (int64_t q = 0; q < m - j; q++) {
                        double sum = more ? out[r * ldc + q] : 0; /* no vector here, so no price for a better sum */
                        for (int64_t k = 0; k < depth; k++) sum += (double)rows[r][k * step] * b[k * ldb + j + q];
                        out[r * ldc + q] = (float)sum;
                    }
        }
        j += wide ? wide * LANES : m - j;
    }
}

/* A square of LANES x LANES, turned in registers: at each stage halves of pairs of rows change places. */
INLINE void turn_square(const float *from, int64_t from_row, float *to, int64_t to_row) {
    vec square[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) square[i] = *(const vec *)(from + i * from_row);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        lanes upper, lower;
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) {
            upper[l] = l & half ? LANES + l - half : l;
            lower[l] = l & half ? LANES + l : l + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                vec first = square[i], second = square[i + half];
                square[i] = __builtin_shuffle(first, second, upper);
                square[i + half] = __builtin_shuffle(first, second, lower);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) *(vec *)(to + i * to_row) = square[i];
}

/* to (m x n) = from (n x m) transposed. */
static void turn(int64_t n, int64_t m, const float *from, float *to) {
    int64_t whole_n = n - n % LANES, whole_m = m - m % LANES;
    for (int64_t i = 0; i < whole_n; i += LANES)
        for (int64_t j = 0; j < whole_m; j += LANES) turn_square(from + i * m + j, m, to + j * n + i, n);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i < whole_n ? whole_m : 0; j < m; j++) to[j * n + i] = from[i * m + j];
}

typedef struct {
    int64_t group, row, rows;
} Task;

/* result (runs, n, out): rows (runs, n, in) times the weights (runs, experts, in, out) of their experts, or times
   weights (runs, experts, out, in) transposed, plus the same of `more_rows` and `more_weights` if they are not null;
   zeros on nobody's rows. 0, or 1 if there is no memory. */
int grouped_matmul(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, const float *rows,
                   const float *weights, const float *more_rows, const float *more_weights, const int32_t *offsets,
                   float *result, int transposed, int threads) {
    const float *lefts[2] = {rows, more_rows}, *rights[2] = {weights, more_weights};
    int terms = more_rows ? 2 : 1, failed = 0;
    int64_t count = 0, size = in * out;
    Task *tasks = malloc(sizeof(Task) * (size_t)(runs * (n / BLOCK + experts + 1)));
    if (!tasks) return 1;
    for (int64_t run = 0; run < runs; run++) {
        int64_t start = 0;
        for (int64_t e = 0; e < experts; e++)
            for (int64_t end = offsets[run * experts + e]; start < end;) {
                int64_t some = end - start < BLOCK ? end - start : BLOCK;
                tasks[count++] = (Task){run * experts + e, run * n + start, some};
                start += some;
            }
        memset(result + (run * n + start) * out, 0, sizeof(float) * (size_t)((n - start) * out));
    }
#pragma omp parallel num_threads(threads) if (threads > 1 && runs * n * size > SMALL)
    {
        float *turned = transposed ? malloc(sizeof(float) * (size_t)(terms * size + 1)) : NULL;
        int64_t group = -1; /* whose weights are turned */
        if (transposed && !turned) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; t++) {
            Task task = tasks[t];
            if (transposed && !turned) continue;
            for (int term = 0; term < terms; term++) {
                const float *weight = rights[term] + task.group * size;
                if (transposed && group != task.group) turn(out, in, weight, turned + term * size);
                if (transposed) weight = turned + term * size;
                product(task.rows, out, in, lefts[term] + task.row * in, in, 1, weight, out, result + task.row * out, out, term);
            }
            group = task.group;
        }
        free(turned);
    }
    free(tasks);
    return failed;
}

/* result (runs, experts, in, out): for every expert the sum over its rows of rows[n]^T grads[n]. */
void grouped_outer(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, const float *rows,
                   const float *grads, const int32_t *offsets, float *result, int threads) {
    int64_t groups = runs * experts;
    int64_t parts = groups < 8 * threads ? (in + 4 * HIGH - 1) / (4 * HIGH) : 1; /* few experts: parts of their rows of weights */
    int64_t high = (in + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && runs * n * in * out > SMALL)
    for (int64_t t = 0; t < groups * parts; t++) {
        int64_t group = t / parts, from = t % parts * high, first = group / experts * n;
        int64_t some = in - from < high ? in - from : high;
        int64_t start = group % experts ? offsets[group - 1] : 0, depth = offsets[group] - start;
        if (some <= 0) continue;
        float *part = result + (group * in + from) * out;
        if (depth)
            product(some, out, depth, rows + (first + start) * in + from, 1, in, grads + (first + start) * out, out, part, out,
                    0);
        else memset(part, 0, sizeof(float) * (size_t)(some * out));
    }
}

/* e^x to two units in the last place, without a branch: 2^n e^r with |r| at most ln 2 / 2 (a Taylor sum of r). */
INLINE float expo(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float magic = 12582912, n = (x * 1.44269504f + magic) - magic; /* rounds to the nearest whole number */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;           /* ln 2 in two parts */
    float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    union {
        int32_t bits;
        float power;
    } two = {((int32_t)n + 127) << 23};
    return p * two.power;
}

/* out = silu(gate) * up, of `count` numbers. */
void swiglu(int64_t count, const float *gate, const float *up, float *restrict out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > SMALL)
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1 + expo(-gate[i])) * up[i];
}

/* Its gradients in gate and up. */
void swiglu_grad(int64_t count, const float *grad, const float *gate, const float *up, float *restrict grad_gate,
                 float *restrict grad_up, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > SMALL)
    for (int64_t i = 0; i < count; i++) {
        float share = 1 / (1 + expo(-gate[i]));
        grad_up[i] = grad[i] * gate[i] * share;
        grad_gate[i] = grad[i] * up[i] * share * (1 + gate[i] * (1 - share));
    }
}

/* Largest, sum, and sum of products: as many partial ones as a vector has lanes, then those. */
#define REDUCE(name, arguments, start, term, join)                     \
    INLINE float name arguments {                                      \
        float part[LANES], all = start;                                \
        for (int l = 0; l < LANES; l++) part[l] = start;               \
        int64_t j = 0;                                                 \
        for (; j + LANES <= n; j += LANES)                             \
            for (int l = 0; l < LANES; l++) {                          \
                float a = part[l], b = term(j + l);                    \
                part[l] = join;                                        \
            }                                                          \
        for (int l = 0; l < LANES; l++) {                              \
            float a = all, b = part[l];                                \
            all = join;                                                \
        }                                                              \
        for (; j < n; j++) {                                           \
            float a = all, b = term(j);                                \
            all = join;                                                \
        }                                                              \
        return all;                                                    \
    }
#define OF_X(j) x[j]
#define OF_XY(j) x[j] * y[j]
REDUCE(largest, (int64_t n, const float *x), -INFINITY, OF_X, a > b ? a : b)
REDUCE(total, (int64_t n, const float *x), 0, OF_X, a + b)
REDUCE(dot, (int64_t n, const float *x, const float *y), 0, OF_XY, a + b)

/* Probabilities (high x width) of queries first .. first + high: softmax(q k^T + bias), zeros on later keys; `keys` is
   k turned. If `log_sums` are known they are used, else they are made. */
INLINE void probabilities(int64_t seq, int64_t dim, int64_t first, int64_t high, int64_t width, const float *q,
                          const float *keys, const float *bias, float *p, float *log_sums, int known) {
    product(high, width, dim, q + first * dim, dim, 1, keys, seq, p, seq, 0);
    for (int64_t i = first; i < first + high; i++, p += seq) {
        int64_t n = i + 1;
        const float *mask = bias + i * seq;
        for (int64_t j = 0; j < n; j++) p[j] += mask[j];
        float from = known ? log_sums[i] : largest(n, p);
        for (int64_t j = 0; j < n; j++) p[j] = expo(p[j] - from);
        if (!known) {
            float sum = total(n, p), share = 1 / sum;
            log_sums[i] = from + logf(sum);
            for (int64_t j = 0; j < n; j++) p[j] *= share;
        }
        for (int64_t j = n; j < width; j++) p[j] = 0;
    }
}

/* Keys that the queries before `end` may see, up to whole vectors. */
INLINE int64_t seen(int64_t end, int64_t seq) {
    int64_t width = (end + WIDE * LANES - 1) / (WIDE * LANES) * (WIDE * LANES);
    return width < seq ? width : seq;
}

/* out (batch, groups, share, seq, dim) = softmax(q k^T + bias) v, causal, and the log of each softmax's sum; q like out,
   k and v (batch, groups, seq, dim), bias (1 or batch, seq, seq) with `own_bias` 0 or 1. 1 if there is no memory. */
int attention(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q, const float *k,
              const float *v, const float *bias, int own_bias, float *out, float *log_sums, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && batch * groups * seq * seq * dim > SMALL)
    for (int64_t t = 0; t < batch * groups; t++) {
        float *keys = malloc(sizeof(float) * (size_t)(seq * dim + HIGH * seq)), *p = keys + seq * dim;
        if (!keys) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        const float *mask = bias + (own_bias ? t / groups * seq * seq : 0);
        turn(seq, dim, k + t * seq * dim, keys);
        for (int64_t h = t * share; h < (t + 1) * share; h++)
            for (int64_t i = 0; i < seq; i += HIGH) {
                int64_t high = seq - i < HIGH ? seq - i : HIGH, width = seen(i + high, seq);
                probabilities(seq, dim, i, high, width, q + h * seq * dim, keys, mask, p, log_sums + h * seq, 0);
                product(high, dim, i + high, p, seq, 1, v + t * seq * dim, dim, out + (h * seq + i) * dim, dim, 0);
            }
        free(keys);
    }
    return failed;
}

/* Its gradients in q, k and v. */
int attention_grad(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q,
                   const float *k, const float *v, const float *bias, int own_bias, const float *out, float *log_sums,
                   const float *grad, float *grad_q, float *grad_k, float *grad_v, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && batch * groups * seq * seq * dim > SMALL)
    for (int64_t t = 0; t < batch * groups; t++) {
        float *keys = malloc(sizeof(float) * (size_t)(2 * seq * dim + 2 * seq * seq));
        if (!keys) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        float *values = keys + seq * dim, *p = values + seq * dim, *s = p + seq * seq; /* s: slope in the scores */
        const float *mask = bias + (own_bias ? t / groups * seq * seq : 0);
        turn(seq, dim, k + t * seq * dim, keys);
        turn(seq, dim, v + t * seq * dim, values);
        for (int64_t h = t * share; h < (t + 1) * share; h++) {
            const float *head = q + h * seq * dim, *up = grad + h * seq * dim, *made = out + h * seq * dim;
            for (int64_t i = 0; i < seq; i += HIGH) {
                int64_t high = seq - i < HIGH ? seq - i : HIGH, width = seen(i + high, seq);
                probabilities(seq, dim, i, high, width, head, keys, mask, p + i * seq, log_sums + h * seq, 1);
                product(high, width, dim, up + i * dim, dim, 1, values, seq, s + i * seq, seq, 0);
                for (int64_t r = i; r < i + high; r++) {
                    float mean = dot(dim, up + r * dim, made + r * dim);
                    for (int64_t j = 0; j < width; j++) s[r * seq + j] = p[r * seq + j] * (s[r * seq + j] - mean);
                }
                product(high, dim, i + high, s + i * seq, seq, 1, k + t * seq * dim, dim, grad_q + (h * seq + i) * dim, dim,
                        0);
            }
            for (int64_t j = 0; j < seq; j += HIGH) { /* keys are seen by the queries from j on */
                int64_t high = seq - j < HIGH ? seq - j : HIGH, at = j * seq + j, depth = seq - j;
                int more = h > t * share;
                product(high, dim, depth, s + at, 1, seq, head + j * dim, dim, grad_k + (t * seq + j) * dim, dim, more);
                product(high, dim, depth, p + at, 1, seq, up + j * dim, dim, grad_v + (t * seq + j) * dim, dim, more);
            }
        }
        free(keys);
    }
    return failed;
}

/* rows (n, dim): the token order[i] / slots of x, times weights[order[i]]: what a weighted sum sends back to its terms. */
void scaled_rows(int64_t n, int64_t dim, int64_t slots, const float *x, const float *weights, const int64_t *order,
                 float *restrict rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * dim > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *from = x + order[i] / slots * dim;
        float weight = weights[order[i]];
        for (int64_t j = 0; j < dim; j++) rows[i * dim + j] = from[j] * weight;
    }
}

/* One step of AdamW for each of `runs` runs of `count` parameters, written to new arrays. `numbers` (runs, 6): what
   gradients are multiplied with, 1 - beta1, 1 - beta2, eps, decay, step; `tiny` keeps the root's slope finite at 0. */
void adamw(int64_t runs, int64_t count, const float *numbers, float tiny, const float *params, const float *grads,
           const float *mu, const float *nu, float *restrict new_params, float *restrict new_mu,
           float *restrict new_nu, int threads) {
    int64_t parts = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && runs * count > SMALL)
    for (int64_t t = 0; t < runs * parts; t++) {
        const float *n = numbers + 6 * (t / parts);
        float scale = n[0], into_mu = n[1], into_nu = n[2], eps = n[3], decay = n[4], step = n[5];
        int64_t first = t / parts * count, start = t % parts * CHUNK;
        int64_t end = start + CHUNK < count ? start + CHUNK : count;
        for (int64_t i = first + start; i < first + end; i++) {
            float grad = grads[i] * scale;
            float m = mu[i] + into_mu * (grad - mu[i]);
            float v = nu[i] + into_nu * (grad * grad - nu[i]);
            new_mu[i] = m;
            new_nu[i] = v;
            new_params[i] = params[i] * decay - step * (m / (sqrtf(v + tiny) + eps));
        }
    }
}
