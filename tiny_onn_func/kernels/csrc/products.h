/* Matrix products whose sums stay in registers, and transposes. */

#pragma once
#include "vectors.h"

#define NEAR 256 /* terms of an outer product that are read again from a near cache */

enum { NEW, MORE, AWAY }; /* what becomes of c: written, added to, or written past the caches */

INLINE void put(float *c, vec value, int how) {
#if defined(__AVX512F__)
    if (how == AWAY) return _mm512_stream_ps(c, (__m512)value);
#elif defined(__AVX2__)
    if (how == AWAY) return _mm256_stream_ps(c, (__m256)value);
#else
    (void)how;
#endif
    *(vec *)c = value;
}

/* c (high x wide vectors) = sum over k of a[i][k * step] * b[k], plus c for MORE, with terms[k] for k in a if there are
   `terms`; sizes are known to the compiler, sums are registers. With `wide` of 0 the rows are `count` floats. What lies
   `ahead` floats behind b, if that is not 0, is asked for meanwhile. */
INLINE void tile(const int high, const int wide, int count, int64_t depth, const float *const a[], int64_t step,
                 const int64_t *terms, const float *b, int64_t ldb, int64_t ahead, float *c, int64_t ldc, int how) {
    vec sum[HIGH][WIDE];
    const float *row[HIGH];
#pragma GCC unroll 8
    for (int i = 0; i < high; i++) {
        row[i] = a[i];
        if (!wide) sum[i][0] = how == MORE ? part(c + i * ldc, count) : (vec){0};
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sum[i][j] = how == MORE ? *(const vec *)(c + i * ldc + j * LANES) : (vec){0};
    }
    for (int64_t k = 0; k < depth; k++, b += ldb) {
        int64_t at = (terms ? terms[k] : k) * step;
        vec right[WIDE];
        if (ahead)
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) __builtin_prefetch(b + ahead + j * LANES);
        if (!wide) right[0] = part(b, count);
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) right[j] = *(const vec *)(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < high; i++) {
            vec left = every(row[i][at]);
            if (!wide) sum[i][0] = fused_of(left, right[0], sum[i][0]);
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) sum[i][j] = fused_of(left, right[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < high; i++) {
        if (!wide) put_part(c + i * ldc, sum[i][0], count);
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) put(c + i * ldc + j * LANES, sum[i][j], how);
    }
}

#define CASE(n)                                                           \
    case n:                                                               \
        tile(n, wide, count, depth, a, step, terms, b, ldb, ahead, c, ldc, how); \
        break;

INLINE void tile_of(int high, const int wide, int count, int64_t depth, const float *const a[], int64_t step,
                    const int64_t *terms, const float *b, int64_t ldb, int64_t ahead, float *c, int64_t ldc, int how) {
    switch (high) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if HIGH == 8
        CASE(7) CASE(8)
#endif
    }
}

/* c (n x m) = a (n x depth) b (depth x m), plus c for MORE, with a[i][k] at a[i * row + k * step], and order[i] for i in a
   if there is an `order`, terms[k] for k in a if there are `terms`. */
INLINE void gathered(int64_t n, int64_t m, int64_t depth, const float *a, int64_t row, const int64_t *order, int64_t step,
                     const int64_t *terms, const float *b, int64_t ldb, int64_t ahead, float *c, int64_t ldc, int how) {
    int64_t late = n > 2 * HIGH ? n - HIGH : 0; /* many rows leave time enough at their end */
    for (int64_t j = 0; j < m; j += WIDE * LANES) {
        int wide = m - j >= WIDE * LANES ? WIDE : (int)(m - j) / LANES, left = (int)(m - j) - LANES;
        for (int64_t i = 0; i < n; i += HIGH) {
            int high = n - i < HIGH ? (int)(n - i) : HIGH;
            const float *rows[HIGH];
            for (int r = 0; r < high; r++) rows[r] = a + (order ? order[i + r] : i + r) * row;
            float *out = c + i * ldc + j;
            if (wide == WIDE) {
                tile_of(high, WIDE, 0, depth, rows, step, terms, b + j, ldb, i < late ? 0 : ahead, out, ldc, how);
                continue;
            }
            if (wide) tile_of(high, 1, 0, depth, rows, step, terms, b + j, ldb, i < late ? 0 : ahead, out, ldc, how);
            int some = wide ? left : left + LANES;
            if (some) tile_of(high, 0, some, depth, rows, step, terms, b + j + wide * LANES, ldb, 0, out + wide * LANES, ldc, how);
        }
    }
}

static inline void product(int64_t n, int64_t m, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,
                    int64_t ldb, float *c, int64_t ldc, int how) {
    gathered(n, m, depth, a, row, NULL, step, NULL, b, ldb, 0, c, ldc, how);
}

/* The same of dense rows, or of rows order[i] if there is an `order`, and of dense weights; see `tile` for `ahead`. */
static inline void product_of(int64_t n, int64_t m, int64_t depth, const float *a, const int64_t *order, const float *b, int64_t ahead,
                       float *c, int how) {
    gathered(n, m, depth, a, depth, order, 1, NULL, b, m, ahead, c, m, how);
}

/* c (n x m) = the sum over k of a[k]^T b[k], or of a[terms[k]]^T b[k], of `n` columns of a, which lie `width` apart. Terms
   are taken some at a time, so that what is read again lies near; no sum's order changes. */
static inline void outer_of(int64_t n, int64_t m, int64_t depth, const float *a, int64_t width, const int64_t *terms, const float *b,
                     float *c, int how) {
    for (int64_t k = 0; k < depth; k += NEAR) {
        int64_t some = depth - k < NEAR ? depth - k : NEAR;
        int now = k ? MORE : depth > NEAR ? NEW : how;
        if (terms) gathered(n, m, some, a, 1, NULL, width, terms + k, b + k * m, m, 0, c, m, now);
        else gathered(n, m, some, a + k * width, 1, NULL, width, NULL, b + k * m, m, 0, c, m, now);
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
static inline void turn(int64_t n, int64_t m, const float *from, float *to) {
    int64_t whole_n = n - n % LANES, whole_m = m - m % LANES;
    for (int64_t i = 0; i < whole_n; i += LANES)
        for (int64_t j = 0; j < whole_m; j += LANES) {
            for (int r = 0; r < LANES; r++) __builtin_prefetch(from + (i + LANES + r) * m + j); /* too many streams for the machine's own guess */
            turn_square(from + i * m + j, m, to + j * n + i, n);
        }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i < whole_n ? whole_m : 0; j < m; j++) to[j * n + i] = from[i * m + j];
}
