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

/* Of each of `n` rows of logits: -log softmax at its label, the entropy of the softmax, the first of the largest (the first
   that is no number, if any is none), and the log of the sum of e^(x - the largest): apart, as beside a logit of 1e8 it has
   no digits left. A label of `none` asks for nothing: zeros for it and
   for the entropy. OUTSIDE if another is no index of the vocabulary. */
int cross_entropy(int64_t n, int64_t vocab, int64_t none, const float *logits, const int64_t *labels, float *restrict losses,
                  float *restrict entropies, int64_t *restrict best, float *restrict log_sums, int threads) {
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(n)) num_threads(threads) reduction(| : outside) if (threads > 1 && n * vocab > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *x = logits + i * vocab;
        float most = largest(vocab, x), sums[2] = {0, 0};
        exponentials(vocab, x, most, sums);
        int is_target = is_index(labels[i], vocab);
        outside |= !is_target && labels[i] != none;
        best[i] = first_of(vocab, x, most, sums[0] != sums[0]);
        log_sums[i] = logf(sums[0]);
        losses[i] = is_target ? (most - x[labels[i]]) + log_sums[i] : 0;
        entropies[i] = is_target ? log_sums[i] - sums[1] / sums[0] : 0;
    }
    return outside ? OUTSIDE : DONE;
}

/* Gradients of the losses in the logits, times grads (n). OUTSIDE also if a row's best is no index, where its label is one. */
int cross_entropy_grad(int64_t n, int64_t vocab, int64_t none, const float *grads, const float *logits,
                       const int64_t *labels, const int64_t *best, const float *log_sums, float *restrict out, int threads) {
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(n)) num_threads(threads) reduction(| : outside) if (threads > 1 && n * vocab > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const float *x = logits + i * vocab;
        float grad = grads[i], log_sum = log_sums[i], *to = out + i * vocab;
        if (is_index(labels[i], vocab) && is_index(best[i], vocab)) {
            float most = x[best[i]];
            for (int64_t j = 0; j < vocab; j++) to[j] = grad * expo((x[j] - most) - log_sum);
            to[labels[i]] -= grad;
            continue;
        }
        outside |= labels[i] != none;
        clear(to, vocab);
    }
    return outside ? OUTSIDE : DONE;
}
