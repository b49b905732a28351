/* Vectors of floats, their sizes, and what is made of one row of them. Every sum is made by one thread in the order of its
   terms, so no bit depends on the number of threads or on what else is in the batch. All arrays are dense and row-major. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
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
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* e^x to two units in the last place, without a branch: 2^n e^r with |r| at most ln 2 / 2 (a Taylor sum of r). */
INLINE float expo(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float magic = 12582912, n = (x * 1.44269504f + magic) - magic; /* rounds to the nearest whole number */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;           /* ln 2 in two parts */
    float p = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    union {
        uint32_t bits;
        float power;
    } two = {(uint32_t)((int32_t)n + 127) << 23};
    return p * two.power;
}

/* The first `count` floats, zeros behind them; and back. What lies behind is neither read nor written. */
INLINE vec part(const float *from, int count) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    vec some = {0};
    memcpy(&some, from, sizeof(float) * (size_t)count);
    return some;
#endif
}

INLINE void put_part(float *to, vec some, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)some);
#else
    memcpy(to, &some, sizeof(float) * (size_t)count);
#endif
}

INLINE vec either(lanes yes, vec a, vec b) { return (vec)(((lanes)a & yes) | ((lanes)b & ~yes)); }

/* A bit for each place that holds `least` or more. */
INLINE unsigned from(float least, vec x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
    lanes yes = x >= least;
    unsigned bits = 0;
    for (int l = 0; l < LANES; l++) bits |= (unsigned)(yes[l] & 1) << l;
    return bits;
#endif
}

/* The numbers of a vector's places. */
INLINE lanes places(void) {
    lanes place;
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) place[l] = l;
    return place;
}

/* e^x, as `expo`, of every place. */
INLINE vec expo_of(vec x) {
    x = either(x < -87, (vec){0} - 87, either(x > 88, (vec){0} + 88, x));
    float magic = 12582912;
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return p * (vec)((__builtin_convertvector(n, lanes) + 127) << 23);
}

/* Largest, sum, and sums of products: a vector of partial ones, which are joined by halves. */
#define JOINED(all, join)                                                             \
    _Pragma("GCC unroll 4") for (int half = LANES / 2; half; half /= 2) {             \
        vec a = all, b = __builtin_shuffle(all, places() ^ half);                     \
        all = join;                                                                   \
    }
#define REDUCE(name, arguments, start, term, join)                                    \
    INLINE float name arguments {                                                     \
        vec all = (vec){0} + (start);                                                 \
        int64_t j = 0;                                                                \
        for (; j + LANES <= n; j += LANES) {                                          \
            vec a = all, b = term(WHOLE);                                             \
            all = join;                                                               \
        }                                                                             \
        if (j < n) {                                                                  \
            vec a = all, b = either(places() < (int)(n - j), term(REST), (vec){0} + (start)); \
            all = join;                                                               \
        }                                                                             \
        JOINED(all, join)                                                             \
        return all[0];                                                                \
    }
#define WHOLE(x) (*(const vec *)((x) + j))
#define REST(x) part((x) + j, (int)(n - j))
#define OF_X(load) load(x)
#define OF_XY(load) (load(x) * load(y))
#define OF_XYZ(load) (load(x) * load(y) * load(z))
REDUCE(largest, (int64_t n, const float *x), -INFINITY, OF_X, either(a > b, a, b))
REDUCE(total, (int64_t n, const float *x), 0, OF_X, a + b)
REDUCE(dot, (int64_t n, const float *x, const float *y), 0, OF_XY, a + b)
REDUCE(dot3, (int64_t n, const float *x, const float *y, const float *z), 0, OF_XYZ, a + b)

/* The same of one vector: what a loop has added up. */
INLINE float largest_of(vec all) {
    JOINED(all, either(a > b, a, b))
    return all[0];
}
INLINE float total_of(vec all) {
    JOINED(all, a + b)
    return all[0];
}
