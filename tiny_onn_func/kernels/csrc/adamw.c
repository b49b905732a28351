/* The optimizer. */

#include "vectors.h"

#define CHUNK 16384 /* parameters that one thread takes at a time */

/* What one step of AdamW makes of `count` parameters. `n`: what gradients are multiplied with, 1 - beta1, 1 - beta2, eps,
   decay, step; `tiny` keeps the root's slope finite at 0. */
static void update(int64_t count, const float *n, float tiny, const float *params, const float *grads, const float *mu,
                   const float *nu, float *restrict new_params, float *restrict new_mu, float *restrict new_nu) {
    float scale = n[0], into_mu = n[1], into_nu = n[2], eps = n[3], decay = n[4], step = n[5];
    for (int64_t i = 0; i < count; i++) {
        float grad = grads[i] * scale;
        float m = fused(into_mu, grad - mu[i], mu[i]);
        float v = fused(into_nu, fused(grad, grad, -nu[i]), nu[i]);
        new_mu[i] = m;
        new_nu[i] = v;
        new_params[i] = fused(-step, m / (sqrtf(v + tiny) + eps), params[i] * decay);
    }
}

/* One step for each of `runs` runs of each leaf's `counts` parameters, written to new arrays. Each leaf's `numbers` are
   (runs, 6). */
void adamw(int64_t leaves, int64_t runs, const int64_t *counts, const float *const *numbers, float tiny,
           const float *const *params, const float *const *grads, const float *const *mu, const float *const *nu,
           float *const *new_params, float *const *new_mu, float *const *new_nu, int threads) {
    int64_t tasks = 0, size = 0;
    for (int64_t leaf = 0; leaf < leaves; leaf++) {
        tasks += runs * ((counts[leaf] + CHUNK - 1) / CHUNK);
        size += runs * counts[leaf];
    }
#pragma omp parallel for schedule(dynamic, PIECE(tasks)) num_threads(threads) if (threads > 1 && size > SMALL)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t leaf = 0, t = task;
        for (int64_t own; t >= (own = runs * ((counts[leaf] + CHUNK - 1) / CHUNK)); leaf++) t -= own;
        int64_t count = counts[leaf], parts = (count + CHUNK - 1) / CHUNK, run = t / parts, start = t % parts * CHUNK;
        int64_t at = run * count + start, some = count - start < CHUNK ? count - start : CHUNK;
        update(some, numbers[leaf] + 6 * run, tiny, params[leaf] + at, grads[leaf] + at, mu[leaf] + at, nu[leaf] + at,
               new_params[leaf] + at, new_mu[leaf] + at, new_nu[leaf] + at);
    }
}
