/* Rows times the weights of their experts. `offsets` (runs, experts) holds, for each run, the row behind the last one of
   each expert; rows behind the last offset belong to nobody. Both kernels return OUTSIDE where offsets do not ascend from 0
   to `n` at most, or an `order` leads away from the tokens. */

#include "products.h"

#define BLOCK (8 * HIGH) /* rows of an expert that one thread takes at a time */
#define FAST 2           /* blocks of weights that are read before one from memory comes */
#define FAR (8 << 20)    /* bytes of a result that no cache would keep for its reader */

typedef struct {
    int64_t group, row, rows;
} Task;

/* Whether each run's offsets ascend from 0 to `n` at most: then every expert's rows are rows of its run. */
static int ascend(int64_t runs, int64_t n, int64_t experts, const int32_t *offsets) {
    int all = 1;
    for (int64_t run = 0; run < runs; run++) {
        int64_t last = 0;
        for (int64_t e = run * experts; e < (run + 1) * experts; e++) {
            all &= last <= offsets[e] && offsets[e] <= n;
            last = offsets[e];
        }
    }
    return all;
}

/* At most LANES rows times transposed weights (out, in), summed over terms: the rows are turned, not the weights, and so
   is what comes out. `room` for (in + 2 out) * LANES. */
static void few_rows(int64_t rows, int64_t in, int64_t out, int terms, const float *const lefts[], const float *const rights[],
                     float *room, float *result) {
    float *sums = room + in * LANES, *back = sums + out * LANES;
    clear(room, in * LANES);
    for (int term = 0; term < terms; term++) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < in; k++) room[k * LANES + i] = lefts[term][i * in + k];
        for (int64_t j = 0; j < out; j += HIGH) {
            const float *weights = rights[term] + j * in;
            for (int64_t k = 0; k < HIGH * in; k += LANES) __builtin_prefetch(weights + FAST * HIGH * in + k); /* every weight is read once */
            product(out - j < HIGH ? out - j : HIGH, LANES, in, weights, in, 1, room, LANES, sums + j * LANES, LANES,
                    term ? MORE : NEW);
        }
    }
    turn(out, LANES, sums, back);
    copy(result, back, rows * out);
}

/* result (runs, n, out): rows (runs, n, in) times the weights (experts, in, out) of their run's experts, which lie `apart`
   floats from one run to the next, or times weights (experts, out, in) transposed, plus the same of `more_rows` and `more_weights` if they are not null;
   zeros on nobody's rows. With an `order` (runs, n) row i of a run is row order[i] of its tokens' `rows` (runs, tokens, in),
   and there are no more. */
int grouped_matmul(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, int64_t tokens, const float *rows,
                   const int64_t *order, const float *weights, const float *more_rows, const float *more_weights, int64_t apart, const int32_t *offsets,
                   float *result, int transposed, int threads) {
    const float *lefts[2] = {rows, more_rows}, *rights[2] = {weights, more_weights};
    int terms = more_rows ? 2 : 1, failed = 0;
    int few = transposed && out % LANES == 0 && in >= 2 * LANES; /* whole vectors: a row's bits are those among many rows */
    int64_t count = 0, size = in * out;
    if (!ascend(runs, n, experts, offsets)) return OUTSIDE;
    Task *tasks = malloc(sizeof(Task) * (size_t)(runs * (n / BLOCK + experts + 1))); /* whole blocks, and a rest for each expert */
    if (!tasks) return NO_MEMORY;
    for (int64_t run = 0; run < runs; run++) {
        int64_t start = 0;
        for (int64_t e = 0; e < experts; e++)
            for (int64_t end = offsets[run * experts + e]; start < end;) {
                int64_t some = end - start < BLOCK ? end - start : BLOCK;
                tasks[count++] = (Task){run * experts + e, run * n + start, some};
                start += some;
            }
        clear(result + (run * n + start) * out, (n - start) * out);
    }
#pragma omp parallel num_threads(threads) if (threads > 1 && runs * n * size > SMALL)
    {
        int64_t needed = terms * size > (in + 2 * out) * LANES ? terms * size : (in + 2 * out) * LANES;
        float *turned = transposed ? malloc(sizeof(float) * (size_t)needed) : NULL;
        int64_t group = -1; /* whose weights are turned */
        if (transposed && !turned) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
        int64_t some = count >= 64 * threads ? 4 : 1; /* neighbours, whose weights are next to each other */
        (void)some;
#pragma omp for schedule(dynamic, some) nowait
        for (int64_t t = 0; t < count; t++) {
            Task task = tasks[t];
            if (transposed && !turned) continue;
            if (order && !are_indices(task.rows, order + task.row, tokens)) {
#pragma omp atomic write
                failed = OUTSIDE;
                continue;
            }
            if (few && task.rows <= LANES) {
                const float *own[2], *weights_of[2];
                for (int term = 0; term < terms; term++) {
                    own[term] = lefts[term] + task.row * in;
                    weights_of[term] = rights[term] + task.group / experts * apart + task.group % experts * size;
                }
                few_rows(task.rows, in, out, terms, own, weights_of, turned, result + task.row * out);
                group = -1;
                continue;
            }
            for (int term = 0; term < terms; term++) {
                const float *weight = rights[term] + task.group / experts * apart + task.group % experts * size;
                if (transposed && group != task.group) turn(out, in, weight, turned + term * size);
                if (transposed) weight = turned + term * size;
                int64_t ahead = !transposed && t + 1 < count && tasks[t + 1].group != task.group ? size : 0; /* the next expert's */
                const float *left = order ? rows + task.row / n * tokens * in : lefts[term] + task.row * in;
                product_of(task.rows, out, in, left, order ? order + task.row : NULL, weight, ahead, result + task.row * out,
                           term ? MORE : NEW);
            }
            group = task.group;
        }
        free(turned);
    }
    free(tasks);
    return failed;
}

/* result (runs, experts, in, out), whose runs lie `apart` floats from one to the next: for every expert the sum over its rows
   of rows[n]^T grads[n]; an `order` as above. */
int outer_apart(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, int64_t tokens, const float *rows,
                const int64_t *order, const float *grads, const int32_t *offsets, float *result, int64_t apart, int threads) {
    int outside = !ascend(runs, n, experts, offsets);
    if (outside) return OUTSIDE;
    int64_t groups = runs * experts;
    int64_t parts = groups < 8 * threads ? (in + 4 * HIGH - 1) / (4 * HIGH) : 1; /* few experts: parts of their rows of weights */
    int64_t high = (in + parts - 1) / parts;
    int aligned = (uintptr_t)result % sizeof(vec) == 0 && out % LANES == 0 && apart % LANES == 0;
    int how = aligned && groups * in * out * (int64_t)sizeof(float) > FAR ? AWAY : NEW;
#pragma omp parallel num_threads(threads) if (threads > 1 && runs * n * in * out > SMALL)
    {
#pragma omp for schedule(dynamic) reduction(| : outside) nowait
        for (int64_t t = 0; t < groups * parts; t++) {
            int64_t group = t / parts, from = t % parts * high, first = group / experts * n;
            int64_t some = in - from < high ? in - from : high;
            int64_t start = group % experts ? offsets[group - 1] : 0, depth = offsets[group] - start;
            if (some <= 0) continue;
            if (order && !are_indices(depth, order + first + start, tokens)) {
                outside = 1;
                continue;
            }
            float *into = result + group / experts * apart + (group % experts * in + from) * out;
            const float *up = grads + (first + start) * out;
            if (depth) {
                const float *a = order ? rows + group / experts * tokens * in : rows + (first + start) * in;
                outer_of(some, out, depth, a + from, in, order ? order + first + start : NULL, up, into, how);
            }
            else clear(into, some * out);
        }
#if defined(__AVX2__)
        _mm_sfence(); /* what was written past the caches is there for all */
#endif
    }
    return outside ? OUTSIDE : DONE;
}

/* The same, dense. */
int grouped_outer(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, int64_t tokens, const float *rows,
                  const int64_t *order, const float *grads, const int32_t *offsets, float *result, int threads) {
    return outer_apart(runs, n, experts, in, out, tokens, rows, order, grads, offsets, result, experts * in * out, threads);
}
