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
        int32_t bits;
        float power;
    } two = {((int32_t)n + 127) << 23};
    return p * two.power;
}

/* Largest, sum, and sum of products: as many partial ones as a vector has lanes, then those. */
#define REDUCE(name, arguments, start, term, join)                     \
    INLINE float name arguments {                                      \
        float part[LANES], all = start;                                \
        for (int l = 0; l < LANES; l++) part[l] = start;               \
        int64_t j = 0;                                                 \
        for (; j + LANES <= n; j += LANES)                             \
            for (int l = 0; l < LANES; l++) {                          \
                float a = part[l], b = term(j + l);                    \
                part[l] = join;                                        \
            }                                                          \
        for (int l = 0; l < LANES; l++) {                              \
            float a = all, b = part[l];                                \
            all = join;                                                \
        }                                                              \
        for (; j < n; j++) {                                           \
            float a = all, b = term(j);                                \
            all = join;                                                \
        }                                                              \
        return all;                                                    \
    }
#define OF_X(j) x[j]
#define OF_XY(j) x[j] * y[j]
REDUCE(largest, (int64_t n, const float *x), -INFINITY, OF_X, a > b ? a : b)
REDUCE(total, (int64_t n, const float *x), 0, OF_X, a + b)
REDUCE(dot, (int64_t n, const float *x, const float *y), 0, OF_XY, a + b)
#define OF_SHARE(j) x[j] * y[j] * z[j]
REDUCE(dot3, (int64_t n, const float *x, const float *y, const float *z), 0, OF_SHARE, a + b)
