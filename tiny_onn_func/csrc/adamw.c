/* The optimizer. */

#include "vectors.h"

#define CHUNK 16384 /* parameters that one thread takes at a time */

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
