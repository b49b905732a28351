/* RMS norms, of rows and of heads, and their gradients. */

#include "vectors.h"

/* out = x / sqrt(mean(x^2) + eps) * weight, of runs of `n` rows; weight (runs, dim). */
void rms_norm(int64_t runs, int64_t n, int64_t dim, float eps, const float *x, const float *weight, float *restrict out,
              int threads) {
#pragma omp parallel for schedule(dynamic, PIECE(runs * n)) num_threads(threads) if (threads > 1 && runs * n * dim > SMALL)
    for (int64_t t = 0; t < runs * n; t++) {
        const float *row = x + t * dim, *scale = weight + t / n * dim;
        float factor = 1 / sqrtf(dot(dim, row, row) / dim + eps);
        for (int64_t j = 0; j < dim; j++) out[t * dim + j] = row[j] * factor * scale[j];
    }
}

/* Gradients of one normed row: in x to `grad_x`, in the weight added to `grad_weight`. */
INLINE void row_grad(int64_t dim, float eps, const float *x, const float *weight, const float *grad, float *restrict grad_x,
                     float *restrict grad_weight) {
    float factor = 1 / sqrtf(dot(dim, x, x) / dim + eps), along = dot3(dim, grad, weight, x) * factor * factor / dim;
    for (int64_t j = 0; j < dim; j++) {
        float slope = grad[j] * factor;
        grad_weight[j] = fused(slope, x[j], grad_weight[j]);
        grad_x[j] = fused(slope, weight[j], -(factor * along) * x[j]);
    }
}

/* Its gradients. `partial` (runs, parts, dim) is room for sums over parts of the rows, so that no bit depends on threads;
   they end in its first part. */
void rms_norm_grad(int64_t runs, int64_t n, int64_t dim, int64_t parts, float eps, const float *x, const float *weight,
                   const float *grad, float *restrict grad_x, float *partial, int threads) {
    int64_t rows = (n + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic, PIECE(runs * parts)) num_threads(threads) if (threads > 1 && runs * n * dim > SMALL)
    for (int64_t t = 0; t < runs * parts; t++) {
        int64_t run = t / parts, start = t % parts * rows, end = start + rows < n ? start + rows : n;
        clear(partial + t * dim, dim);
        for (int64_t i = run * n + start; i < run * n + end; i++)
            row_grad(dim, eps, x + i * dim, weight + run * dim, grad + i * dim, grad_x + i * dim, partial + t * dim);
    }
    for (int64_t run = 0; run < runs; run++)
        for (int64_t part = 1; part < parts; part++)
            for (int64_t j = 0; j < dim; j++) partial[run * parts * dim + j] += partial[(run * parts + part) * dim + j];
}

/* qkv (batch, seq, heads + 2 groups, dim) -> q (batch, heads, seq, dim), k and v (batch, groups, seq, dim), of all runs'
   batches: q and k normed, times their head's norms (runs, heads + groups, dim), and turned by their positions' angles,
   cos and sin (seq, dim), the sine negative in the first half. */
void split_heads(int64_t runs, int64_t batch, int64_t seq, int64_t heads, int64_t groups, int64_t dim, float eps,
                 const float *qkv, const float *norms, const float *cosines, const float *sines, float *restrict q,
                 float *restrict k, float *restrict v, int threads) {
    int64_t width = heads + 2 * groups, normed = heads + groups, half = dim / 2;
#pragma omp parallel for schedule(dynamic, PIECE(runs * batch * seq)) num_threads(threads) if (threads > 1 && runs * batch * seq * width * dim > SMALL)
    for (int64_t t = 0; t < runs * batch * seq; t++) {
        int64_t b = t / seq, i = t % seq;
        const float *c = cosines + i * dim, *s = sines + i * dim;
        for (int64_t h = 0; h < width; h++) {
            const float *x = qkv + (t * width + h) * dim;
            if (h >= normed) {
                copy(v + ((b * groups + h - normed) * seq + i) * dim, x, dim);
                continue;
            }
            float *to = h < heads ? q + ((b * heads + h) * seq + i) * dim : k + ((b * groups + h - heads) * seq + i) * dim;
            const float *weight = norms + (b / batch * normed + h) * dim;
            float factor = 1 / sqrtf(dot(dim, x, x) / dim + eps);
            for (int64_t j = 0; j < half; j++) {
                float first = x[j] * factor * weight[j], second = x[j + half] * factor * weight[j + half];
                to[j] = fused(first, c[j], second * s[j]);
                to[j + half] = fused(second, c[j + half], first * s[j + half]);
            }
        }
    }
}

/* Its gradients: grad_qkv, and grad_norms (runs, batch, heads + groups, dim), those of each of a run's batches; `room`
   (runs, batch, dim) is scratch. */
void split_heads_grad(int64_t runs, int64_t batch, int64_t seq, int64_t heads, int64_t groups, int64_t dim, float eps,
                      const float *qkv, const float *norms, const float *cosines, const float *sines, const float *grad_q,
                      const float *grad_k, const float *grad_v, float *restrict grad_qkv, float *restrict grad_norms,
                      float *restrict room, int threads) {
    int64_t width = heads + 2 * groups, normed = heads + groups, half = dim / 2;
#pragma omp parallel for schedule(dynamic, PIECE(runs * batch)) num_threads(threads) if (threads > 1 && runs * batch * seq * width * dim > SMALL)
    for (int64_t b = 0; b < runs * batch; b++) {
        float *turned = room + b * dim, *sums = grad_norms + b * normed * dim;
        clear(sums, normed * dim);
        for (int64_t i = 0; i < seq; i++) {
            const float *c = cosines + i * dim, *s = sines + i * dim;
            for (int64_t h = 0; h < width; h++) {
                int64_t at = ((b * seq + i) * width + h) * dim;
                if (h >= normed) {
                    copy(grad_qkv + at, grad_v + ((b * groups + h - normed) * seq + i) * dim, dim);
                    continue;
                }
                const float *grad = h < heads ? grad_q + ((b * heads + h) * seq + i) * dim
                                              : grad_k + ((b * groups + h - heads) * seq + i) * dim;
                for (int64_t j = 0; j < half; j++) { /* turned back */
                    turned[j] = fused(grad[j], c[j], grad[j + half] * s[j + half]);
                    turned[j + half] = fused(grad[j + half], c[j + half], grad[j] * s[j]);
                }
                row_grad(dim, eps, qkv + at, norms + (b / batch * normed + h) * dim, turned, grad_qkv + at, sums + h * dim);
            }
        }
    }
}
