/* Vectors of floats, their sizes, and what is made of one row of them. Every sum is made by one thread in the order of its
   terms, so no bit depends on the number of threads or on what else is in the batch; nor does it on the place in a vector or
   a tile, for where a product and a sum are rounded at once is said in the source (`fused`, `fused_of`) and not left to the
   compiler, which decides it loop by loop (build.py forbids it). All arrays are dense and row-major.

   Whatever is used as an index is compared with its bound where it is read, and where that is not seen at once a comment says
   why it holds. What lies outside is left out, and the kernel returns OUTSIDE: what it has made is then worth nothing. */

#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
#define SMALL 100000     /* multiplications that are not worth a second thread */
#define PIECE(n) (1 + (n) / (8 * threads)) /* of a loop, that one thread takes at a time; pool.c */
#define INLINE static inline __attribute__((always_inline))

enum { DONE, NO_MEMORY, OUTSIDE }; /* what a kernel returns; OUTSIDE if a number is no index of what it should point into */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE int is_index(int64_t i, int64_t bound) { return (uint64_t)i < (uint64_t)bound; }

INLINE int are_indices(int64_t n, const int64_t *indices, int64_t bound) {
    int64_t strangers = 0;
    for (int64_t i = 0; i < n; i++) strangers |= !is_index(indices[i], bound);
    return !strangers;
}

/* a * b + c, rounded once where the processor can. */
INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE vec fused_of(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Nothing may have no address, which the library's own functions refuse. */
INLINE void clear(float *to, int64_t n) {
    if (n > 0) memset(to, 0, sizeof(float) * (size_t)n);
}

INLINE void copy(float *to, const float *from, int64_t n) {
    if (n > 0) memcpy(to, from, sizeof(float) * (size_t)n);
}

INLINE vec every(float x) { return x - (vec){0}; } /* not 0 + x, which makes 0 of -0 */

/* x, or the nearer end where it lies outside; what is no number stays. */
INLINE float within(float low, float x, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* e^x to two units in the last place, without a branch: 2^(n - 1) 2 e^r, of a Taylor sum of r, |r| at most ln 2 / 2. Beyond
   FLT_MAX it is infinite; it is 0 where n is -126 or less, so next to nothing but 0 is below FLT_MIN, or would be. */
#define LOWEST -87.2f  /* n is -126: 2^(n - 1) has no exponent and no digits */
#define HIGHEST 89     /* n is 128, the sum is no less than 2 */
#define MAGIC 12582912 /* 1.5 * 2^23: a sum with it is rounded to a whole number, which lies in its last bits */
INLINE float expo(float x) {
    union {
        float number;
        uint32_t bits;
    } n, power;
    x = within(LOWEST, x, HIGHEST);
    n.number = fused(x, 1.44269504f, MAGIC);
    float whole = n.number - MAGIC, r = fused(whole, 2.12194440e-4f, fused(whole, -0.693359375f, x)); /* ln 2 in two parts */
    float sum = fused(r, fused(r, fused(r, 2 / 720.f, 2 / 120.f), 2 / 24.f), 2 / 6.f);
    sum = fused(r, fused(r, fused(r, sum, 1), 2), 2);
    power.bits = (n.bits + 126) << 23; /* the other bits of MAGIC are shifted out */
    return sum * power.number;
}

/* The numbers of a vector's places. */
INLINE lanes places(void) {
    lanes place;
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) place[l] = l;
    return place;
}

/* The first `count` floats, zeros behind them; and back. What lies behind is neither read nor written. */
INLINE vec part(const float *from, int count) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif defined(__AVX2__)
    return (vec)_mm256_maskload_ps(from, (__m256i)(places() < count));
#else
    vec some = {0};
    memcpy(&some, from, sizeof(float) * (size_t)count);
    return some;
#endif
}

INLINE void put_part(float *to, vec some, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)some);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(to, (__m256i)(places() < count), (__m256)some);
#else
    memcpy(to, &some, sizeof(float) * (size_t)count);
#endif
}

INLINE vec either(lanes yes, vec a, vec b) { return (vec)(((lanes)a & yes) | ((lanes)b & ~yes)); }

/* A bit for each place that is true. */
INLINE unsigned bits_of(lanes yes) {
#if defined(__AVX512F__)
    return _mm512_cmplt_epi32_mask((__m512i)yes, _mm512_setzero_si512());
#elif defined(__AVX2__)
    return (unsigned)_mm256_movemask_ps((__m256)yes);
#else
    unsigned bits = 0;
    for (int l = 0; l < LANES; l++) bits |= (unsigned)(yes[l] & 1) << l;
    return bits;
#endif
}

/* e^x, as `expo`, of every place. */
INLINE vec expo_of(vec x) {
#if defined(__AVX512F__)
    x = (vec)_mm512_min_ps((__m512)every(HIGHEST), _mm512_max_ps((__m512)every(LOWEST), (__m512)x)); /* the second of no number */
#elif defined(__AVX2__)
    x = (vec)_mm256_min_ps((__m256)every(HIGHEST), _mm256_max_ps((__m256)every(LOWEST), (__m256)x));
#else
    x = either(x < LOWEST, every(LOWEST), either(x > HIGHEST, every(HIGHEST), x));
#endif
    vec n = fused_of(x, every(1.44269504f), every(MAGIC)), whole = n - MAGIC;
    vec r = fused_of(whole, every(2.12194440e-4f), fused_of(whole, every(-0.693359375f), x));
    vec sum = fused_of(r, fused_of(r, fused_of(r, every(2 / 720.f), every(2 / 120.f)), every(2 / 24.f)), every(2 / 6.f));
    sum = fused_of(r, fused_of(r, fused_of(r, sum, every(1)), every(2)), every(2));
    return sum * (vec)(((words)n + 126) << 23);
}

/* Largest, sum, and sums of products: a vector of partial ones, which are joined by halves. */
#define JOINED(all, join)                                                             \
    _Pragma("GCC unroll 4") for (int half = LANES / 2; half; half /= 2) {             \
        vec a = all, b = __builtin_shuffle(all, places() ^ half);                     \
        all = join;                                                                   \
    }
#define REDUCE(name, arguments, start, with, join)                                    \
    INLINE float name arguments {                                                     \
        vec all = every(start);                                                       \
        int64_t j = 0;                                                                \
        for (; j + LANES <= n; j += LANES) all = with(WHOLE);                         \
        if (j < n) all = either(places() < (int)(n - j), with(REST), all);            \
        JOINED(all, join)                                                             \
        return all[0];                                                                \
    }
#define WHOLE(x) (*(const vec *)((x) + j))
#define REST(x) part((x) + j, (int)(n - j))
#define OR_X(load) either(all > load(x), all, load(x))
#define AND_XY(load) (all + load(x) * load(y)) /* a chain of sums is shorter than one of fused ones */
#define AND_XYZ(load) (all + load(x) * load(y) * load(z))
REDUCE(largest, (int64_t n, const float *x), -INFINITY, OR_X, either(a > b, a, b))
REDUCE(dot, (int64_t n, const float *x, const float *y), 0, AND_XY, a + b)
REDUCE(dot3, (int64_t n, const float *x, const float *y, const float *z), 0, AND_XYZ, a + b)

/* Whether all are finite: 0 times any other number is none. */
INLINE int are_finite(int64_t n, const float *x) {
    vec all = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) all += WHOLE(x) * 0;
    if (j < n) all += REST(x) * 0;
    JOINED(all, a + b)
    return all[0] == 0;
}

/* The first of the largest numbers, `most` being what `largest` has found; or, if that `may` be so, the first that is none. */
INLINE int64_t first_of(int64_t n, const float *x, float most, int may) {
    for (; may >= 0; may--)
        for (int64_t j = 0; j < n; j += LANES) {
            vec some = n - j < LANES ? part(x + j, (int)(n - j)) : *(const vec *)(x + j);
            unsigned found = bits_of((may ? some != some : some == most) & (places() < (n - j < LANES ? (int)(n - j) : LANES)));
            if (found) return j + __builtin_ctz(found);
        }
    return 0; /* there are no numbers */
}

/* The same of one vector: what a loop has added up. */
INLINE float largest_of(vec all) {
    JOINED(all, either(a > b, a, b))
    return all[0];
}
INLINE float smallest_of(vec all) {
    JOINED(all, either(a < b, a, b))
    return all[0];
}
INLINE float total_of(vec all) {
    JOINED(all, a + b)
    return all[0];
}
