/* Cross entropy of rows of logits, and its gradient. */

#include "vectors.h"

/* Sums of e^(x - most), and of those times x - most. */
INLINE void exponentials(int64_t n, const float *x, float most, float sums[2]) {
    vec sum = {0}, moment = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        int some = n - j < LANES ? (int)(n - j) : LANES;
        vec below = (some < LANES ? part(x + j, some) : *(const vec *)(x + j)) - most, power = expo_of(below);
        if (some < LANES) power = either(places() < some, power, (vec){0}), below = either(places() < some, below, (vec){0});
        sum += power;
        moment += power * below;
    }
    sums[0] = total_of(sum);
    sums[1] = total_of(moment);
}

/* Of each of `n` rows of logits: -log softmax at its label, the entropy of the softmax, the first of the largest, and the
   log of the softmax's sum. A negative label is none: zeros for it and for the entropy. */
void cross_entropy(int64_t n, int64_t vocab, const float *logits, const int64_t *labels, float *restrict losses,
                   float *restrict entropies, int64_t *restrict best, float *restrict log_sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * vocab > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *x = logits + i * vocab;
        float most = largest(vocab, x), sums[2] = {0, 0};
        exponentials(vocab, x, most, sums);
        int64_t first = 0;
        while (first < vocab - 1 && x[first] != most) first++;
        best[i] = first;
        log_sums[i] = most + logf(sums[0]);
        losses[i] = labels[i] < 0 ? 0 : log_sums[i] - x[labels[i]];
        entropies[i] = labels[i] < 0 ? 0 : logf(sums[0]) - sums[1] / sums[0];
    }
}

/* Gradients of the losses in the logits, times grads (n). */
void cross_entropy_grad(int64_t n, int64_t vocab, const float *grads, const float *logits, const int64_t *labels,
                        const float *log_sums, float *restrict out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * vocab > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *x = logits + i * vocab;
        float grad = labels[i] < 0 ? 0 : grads[i], from = log_sums[i], *to = out + i * vocab;
        if (labels[i] < 0) memset(to, 0, sizeof(float) * (size_t)vocab);
        else {
            for (int64_t j = 0; j < vocab; j++) to[j] = grad * expo(x[j] - from);
            to[labels[i]] -= grad;
        }
    }
}
