/* What the router decides and what it learns from: experts chosen, surprise written down, targets, and the router's loss.
   Rows are (run, layer, token) unless said; `experts` numbers each. */

#include "vectors.h"

/* How many of the first `count` places come before each: those of a larger score, or of an equal one and a larger logit, or
   of equals of both and further in front. */
INLINE lanes ranks(int count, vec score, vec logit) {
    float scores[LANES], logits[LANES];
    *(vec *)scores = score;
    *(vec *)logits = logit;
    lanes rank = {0}, place = places();
    for (int j = 0; j < count; j++) {
        lanes equal = (scores[j] == score) & ((logits[j] > logit) | ((logits[j] == logit) & (place > j)));
        rank -= (scores[j] > score) | equal; /* true is -1 */
    }
    return rank;
}

/* The `k` largest, at most all, of `width` scores in the order of `ranks`; both arrays are whole vectors long, with -infinity behind their
   end and for what is not a number. `best` is scratch of `k`. */
INLINE void best_of(int64_t width, int64_t k, const float *scores, const float *logits, float *best, int64_t *ids) {
    if (width <= LANES) {
        int32_t rank[LANES];
        int64_t in_order[LANES];
        *(lanes *)rank = ranks((int)width, *(const vec *)scores, *(const vec *)logits);
        for (int64_t i = 0; i < width; i++) in_order[rank[i]] = i; /* the order is total: ranks are 0 to width - 1, each once */
        for (int64_t m = 0; m < k; m++) ids[m] = in_order[m];      /* k is at most width */
        return;
    }
    float least = -INFINITY; /* the k-th of the largest of each place is no larger than the k-th of all */
    if (k <= LANES) {
        vec most = *(const vec *)scores;
        for (int64_t j = LANES; j < width; j += LANES) most = either(most > *(const vec *)(scores + j), most, *(const vec *)(scores + j));
        least = largest_of(either(ranks(LANES, most, (vec){0}) == (int)k - 1, most, (vec){0} - INFINITY));
    }
    int64_t count = 0;
    for (int64_t j = 0; j < width; j += LANES) {
        unsigned asked = bits_of(*(const vec *)(scores + j) >= (count == k ? best[k - 1] : least));
        if (width - j < LANES) asked &= (1u << (width - j)) - 1;
        for (; asked; asked &= asked - 1) {
            int64_t place = j + __builtin_ctz(asked), at = count;
            float score = scores[place];
            while (at > 0 && (score > best[at - 1] || (score == best[at - 1] && logits[place] > logits[ids[at - 1]]))) at--;
            if (at == k) continue;
            if (count < k) count++;
            for (int64_t m = count - 1; m > at; m--) best[m] = best[m - 1], ids[m] = ids[m - 1];
            best[at] = score;
            ids[at] = place;
        }
    }
}

/* p = e^(x - most), most being the largest: their sum. */
INLINE float powers(int64_t n, const float *x, float most, float *restrict p) {
    vec sum = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) sum += *(vec *)(p + j) = expo_of(*(const vec *)(x + j) - most);
    if (j < n) {
        vec last = either(places() < (int)(n - j), expo_of(part(x + j, (int)(n - j)) - most), (vec){0});
        put_part(p + j, last, (int)(n - j));
        sum += last;
    }
    return total_of(sum);
}

/* Of each of `n` tokens of each run: the `slots` experts of the largest softmax + bias (runs, experts), which of them are
   kept, and the softmax of the kept ones' logits, which is no number if any of the token's logits is none. With `dynamic` those are kept whose betters' softmax sums to less than
   the run's budget, or all of them from a budget of 1 on, and `least` in any case; else all. Nothing is kept where a token
   is not `real` (runs, n). There are no more slots than experts. NO_MEMORY if there is none. */
int choose(int64_t runs, int64_t n, int64_t experts, int64_t slots, int64_t least, int dynamic, const float *logits,
           const float *bias, const double *budgets, const uint8_t *real, float *restrict weights, int64_t *restrict ids,
           uint8_t *restrict active, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && runs * n * experts * 16 > SMALL)
    {
        int64_t room = (experts + LANES - 1) / LANES * LANES;
        float *p = malloc(sizeof(float) * (size_t)(3 * room + slots));
        if (!p) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, PIECE(runs * n)) nowait
        for (int64_t i = 0; i < runs * n; i++) {
            if (!p) continue;
            const float *x = logits + i * experts, *push = bias + i / n * experts;
            float *ranked = p + room, *known = ranked + room, *best = known + room;
            float most = largest(experts, x), sum = powers(experts, x, most, p);
            for (int64_t e = 0; e < experts; e += LANES) {
                int some = experts - e < LANES ? (int)(experts - e) : LANES;
                vec share = (some < LANES ? part(p + e, some) : *(vec *)(p + e)) / sum;
                vec score = share + (some < LANES ? part(push + e, some) : *(const vec *)(push + e));
                vec logit = some < LANES ? part(x + e, some) : *(const vec *)(x + e), none = (vec){0} - INFINITY;
                *(vec *)(p + e) = share;
                *(vec *)(ranked + e) = either((score == score) & (places() < some), score, none);
                *(vec *)(known + e) = either((logit == logit) & (places() < some), logit, none);
            }
            int64_t *chosen = ids + i * slots;
            best_of(experts, slots, ranked, known, best, chosen);
            float *weight = weights + i * slots, all = 0;
            double mass = 0;
            most = -INFINITY;
            uint8_t *kept = active + i * slots;
            for (int64_t m = 0; m < slots; m++) {
                kept[m] = real[i] && (!dynamic || m < least || budgets[i / n] >= 1 || (float)mass < budgets[i / n]);
                mass += p[chosen[m]];
                if (kept[m] && x[chosen[m]] > most) most = x[chosen[m]];
            }
            for (int64_t m = 0; m < slots; m++) all += weight[m] = kept[m] ? expo(x[chosen[m]] - most) : 0;
            for (int64_t m = 0; m < slots; m++) weight[m] = kept[m] ? weight[m] / all + (sum - sum) : 0; /* nan if any logit is */
        }
        free(p);
    }
    return failed;
}

/* surface (runs, tokens, experts): for each of `n` rows of each run ||left|| * ||right||, or if `is_signed` <left, right>, at
   its token and expert; infinity elsewhere. Rows of nobody have expert `experts`. OUTSIDE if another is no expert, or somebody's
   token none. */
int spread_surprise(int64_t runs, int64_t n, int64_t left_dim, int64_t right_dim, int64_t tokens, int64_t experts, int is_signed,
                    const float *left, const float *right, const int64_t *token, const int64_t *expert,
                    float *restrict surface, int threads) {
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(runs * tokens)) num_threads(threads) if (threads > 1 && runs * tokens * experts > SMALL)
    for (int64_t i = 0; i < runs * tokens; i++)
        for (int64_t e = 0; e < experts; e++) surface[i * experts + e] = INFINITY;
#pragma omp parallel for schedule(dynamic, PIECE(runs * n)) num_threads(threads) reduction(| : outside) \
    if (threads > 1 && runs * n * (left_dim + right_dim) > SMALL)
    for (int64_t i = 0; i < runs * n; i++) {
        if (expert[i] == experts) continue;
        if (!is_index(expert[i], experts) || !is_index(token[i], tokens)) {
            outside = 1;
            continue;
        }
        const float *x = left + i * left_dim, *g = right + i * right_dim;
        float value = is_signed ? dot(left_dim, x, g) : sqrtf(dot(left_dim, x, x)) * sqrtf(dot(right_dim, g, g));
        surface[(i / n * tokens + token[i]) * experts + expert[i]] = value;
    }
    return outside ? OUTSIDE : DONE;
}

/* The first LANES, or `left`, of sign * surprise, 0 where a surprise is below the smallest normal number; `known` are those
   that are finite. */
INLINE vec signed_of(const float *surprise, int64_t left, float sign, lanes *known) {
    vec x = left < LANES ? part(surprise, (int)left) : *(const vec *)surprise, size = (vec)((words)x & 0x7fffffff);
    *known = (size < INFINITY) & (left < LANES ? places() < (int)left : places() < LANES);
    return either(size < FLT_MIN, (vec){0}, x) * sign;
}

/* Of each row: the expert of the least finite sign * surprise, the first of equals; whether it teaches, being real (runs,
   tokens), with at least as many candidates as its run's `least`, not all of them tied; and whether they are tied, the
   largest no more than `tolerance` times the larger size of the two above the least. What is below the smallest normal
   number counts as 0: so small a gradient is none. */
void least_surprised(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, float tolerance, const float *surprise,
                     const uint8_t *real, const float *least, const float *sign, int64_t *restrict expert,
                     uint8_t *restrict informative, uint8_t *restrict tied, int threads) {
#pragma omp parallel for schedule(dynamic, PIECE(runs * layers * tokens)) num_threads(threads) if (threads > 1 && runs * layers * tokens * experts * 4 > SMALL)
    for (int64_t i = 0; i < runs * layers * tokens; i++) {
        int64_t run = i / (layers * tokens), count = 0, first = 0;
        const float *x = surprise + i * experts;
        vec low = every(INFINITY), high = every(-INFINITY);
        lanes counted = {0};
        for (int64_t e = 0; e < experts; e += LANES) {
            lanes known;
            vec value = signed_of(x + e, experts - e, sign[run], &known);
            counted -= known; /* true is -1 */
            low = either(known & (value < low), value, low);
            high = either(known & (value > high), value, high);
        }
        float lowest = smallest_of(low), highest = largest_of(high);
        for (int l = 0; l < LANES; l++) count += counted[l];
        while (count && first < experts - 1) {
            lanes known;
            vec value = signed_of(x + first, experts - first, sign[run], &known);
            unsigned places_of = bits_of(known & (value == lowest));
            if (places_of) {
                first += __builtin_ctz(places_of);
                break;
            }
            first += LANES;
        }
        int eligible = real[run * tokens + i % tokens] && count >= least[run] && count >= 1;
        tied[i] = eligible && count > 1 && highest - lowest <= tolerance * fmaxf(fabsf(highest), fabsf(lowest));
        informative[i] = eligible && !tied[i];
        expert[i] = first;
    }
}

/* What the router's loss sums over a layer's tokens: `picked` (runs, layers), -log softmax at the target of those that
   teach; `mass` (runs, layers, experts), the softmax of real ones; `squares` (runs, layers), their squared log of sums.
   NO_MEMORY if there is none, OUTSIDE if the target of one that teaches is no expert. */
int router_sums(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, const float *logits, const int64_t *target,
                const uint8_t *informative, const uint8_t *real, float *restrict picked, float *restrict mass,
                float *restrict squares, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && runs * layers * tokens * experts * 16 > SMALL)
    {
        double *sums = malloc(sizeof(double) * (size_t)experts);
        float *p = malloc(sizeof(float) * (size_t)experts);
        if (!sums || !p) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, PIECE(runs * layers)) nowait
        for (int64_t part = 0; part < runs * layers; part++) {
            if (!sums || !p) continue;
            double cross = 0, square = 0;
            int strangers = 0;
            for (int64_t e = 0; e < experts; e++) sums[e] = 0;
            for (int64_t t = 0; t < tokens; t++) {
                int64_t i = part * tokens + t;
                int is_real = real[part / layers * tokens + t];
                if (!is_real && !informative[i]) continue;
                const float *x = logits + i * experts;
                float most = largest(experts, x), sum = powers(experts, x, most, p), above = logf(sum), log_sum = most + above;
                int teaches = informative[i] && is_index(target[i], experts);
                if (teaches) cross += (most - x[target[i]]) + above; /* apart: log_sum has no digits for `above` beside 1e8 */
                strangers |= informative[i] && !teaches;
                if (!is_real) continue;
                square += (double)log_sum * log_sum;
                for (int64_t e = 0; e < experts; e++) sums[e] += p[e] / sum;
            }
            if (strangers) {
#pragma omp atomic write
                failed = OUTSIDE;
            }
            picked[part] = (float)cross;
            squares[part] = (float)square;
            for (int64_t e = 0; e < experts; e++) mass[part * experts + e] = (float)sums[e];
        }
        free(sums);
        free(p);
    }
    return failed;
}

/* Gradients of those sums in the logits, times grads of each sum. */
int router_sums_grad(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, const float *logits,
                     const int64_t *target, const uint8_t *informative, const uint8_t *real, const float *grad_picked,
                     const float *grad_mass, const float *grad_squares, float *restrict out, int threads) {
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(runs * layers * tokens)) num_threads(threads) reduction(| : outside) \
    if (threads > 1 && runs * layers * tokens * experts * 16 > SMALL)
    for (int64_t i = 0; i < runs * layers * tokens; i++) {
        int64_t part = i / tokens;
        int is_real = real[part / layers * tokens + i % tokens], teaches = informative[i] && is_index(target[i], experts);
        outside |= informative[i] && !teaches;
        const float *x = logits + i * experts, *pull = grad_mass + part * experts;
        float *to = out + i * experts;
        if (!is_real && !teaches) {
            clear(to, experts);
            continue;
        }
        float most = largest(experts, x), sum = powers(experts, x, most, to);
        for (int64_t e = 0; e < experts; e++) to[e] /= sum;
        float cross = teaches ? grad_picked[part] : 0;
        float all = cross + (is_real ? 2 * (most + logf(sum)) * grad_squares[part] - dot(experts, to, pull) : 0);
        for (int64_t e = 0; e < experts; e++) to[e] *= all + (is_real ? pull[e] : 0);
        if (teaches) to[target[i]] -= cross;
    }
    return outside ? OUTSIDE : DONE;
}

/* Counts of a layer's tokens, each (runs, layers): those that teach, those of them whose largest logit is the target's
   (the first of equals), what a routed expert at random would hit, those tied, visits of real ones; and (runs, layers,
   experts): active slots, targets, finite surprise and how much of it there is. OUTSIDE if the expert of an active slot is
   none, or the target of one that teaches. */
int routing_sums(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, int64_t slots, const float *logits,
                 const float *surprise, const int64_t *ids, const uint8_t *active, const int64_t *target,
                 const uint8_t *informative, const uint8_t *tied, const uint8_t *real, int64_t *restrict counts,
                 float *restrict chance, int64_t *restrict routed, int64_t *restrict wanted, double *restrict sizes,
                 int64_t *restrict sized, int threads) {
    int64_t parts = runs * layers;
    int outside = 0;
#pragma omp parallel for schedule(dynamic, PIECE(parts)) num_threads(threads) reduction(| : outside) \
    if (threads > 1 && parts * tokens * experts * 4 > SMALL)
    for (int64_t part = 0; part < parts; part++) {
        int64_t taught = 0, hits = 0, ties = 0, visits = 0, *rows = routed + part * experts, *aims = wanted + part * experts;
        int64_t *seen = sized + part * experts;
        double *size = sizes + part * experts;
        double lucky = 0;
        for (int64_t e = 0; e < experts; e++) rows[e] = aims[e] = seen[e] = 0, size[e] = 0;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t i = part * tokens + t, open = 0;
            const float *x = logits + i * experts;
            for (int64_t m = i * slots; m < (i + 1) * slots; m++)
                if (active[m]) {
                    open++;
                    if (is_index(ids[m], experts)) rows[ids[m]]++;
                    else outside = 1;
                }
            if (real[part / layers * tokens + t]) visits += open;
            ties += tied[i];
            for (int64_t e = 0; e < experts; e++) {
                float value = surprise[i * experts + e];
                int finite = fabsf(value) < INFINITY;
                size[e] += finite ? value : 0;
                seen[e] += finite;
            }
            if (!informative[i]) continue;
            taught++;
            lucky += 1.0 / (open ? open : 1);
            if (is_index(target[i], experts)) aims[target[i]]++;
            else outside = 1;
            hits += first_of(experts, x, largest(experts, x), 1) == target[i];
        }
        counts[part] = taught;
        counts[parts + part] = hits;
        counts[2 * parts + part] = ties;
        counts[3 * parts + part] = visits;
        chance[part] = (float)lucky;
    }
    return outside ? OUTSIDE : DONE;
}
