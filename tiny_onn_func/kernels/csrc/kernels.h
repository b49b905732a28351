/* Kernels that decoder.c calls, each described where it is defined. */

#pragma once
#include <stdint.h>

int grouped_matmul(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, int64_t tokens, const float *rows,
                   const int64_t *order, const float *weights, const float *more_rows, const float *more_weights, int64_t apart,
                   const int32_t *offsets, float *result, int transposed, int threads);
int outer_apart(int64_t runs, int64_t n, int64_t experts, int64_t in, int64_t out, int64_t tokens, const float *rows,
                const int64_t *order, const float *grads, const int32_t *offsets, float *result, int64_t apart, int threads);
void swiglu(int64_t count, const float *gate, const float *up, float *restrict out, int threads);
void swiglu_grad(int64_t count, const float *grad, const float *gate, const float *up, float *restrict grad_gate,
                 float *restrict grad_up, int threads);
int scaled_rows(int64_t n, int64_t dim, int64_t slots, int64_t tokens, const float *x, const float *weights,
                const int64_t *order, float *restrict rows, int threads);
int combined_rows(int64_t n, int64_t dim, int64_t slots, int64_t rows, const float *y, const float *weights,
                  const int64_t *inverse, float *restrict out, int threads);
int sort_rows(int64_t runs, int64_t n, int64_t experts, const int64_t *ids, const uint8_t *active, int64_t *restrict order,
              int64_t *restrict inverse, int64_t *restrict expert, int32_t *restrict offsets, int threads);
void rms_norm(int64_t runs, int64_t n, int64_t dim, float eps, const float *x, const float *weight, float *restrict out,
              int threads);
void rms_norm_grad(int64_t runs, int64_t n, int64_t dim, int64_t parts, float eps, const float *x, const float *weight,
                   const float *grad, float *restrict grad_x, float *partial, int threads);
void split_heads(int64_t runs, int64_t batch, int64_t seq, int64_t heads, int64_t groups, int64_t dim, float eps,
                 const float *qkv, const float *norms, const float *cosines, const float *sines, float *restrict q,
                 float *restrict k, float *restrict v, int threads);
void split_heads_grad(int64_t runs, int64_t batch, int64_t seq, int64_t heads, int64_t groups, int64_t dim, float eps,
                      const float *qkv, const float *norms, const float *cosines, const float *sines, const float *grad_q,
                      const float *grad_k, const float *grad_v, float *restrict grad_qkv, float *restrict grad_norms,
                      float *restrict room, int threads);
int attention(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q, const float *k,
              const float *v, const float *bias, int64_t masks, float *out, float *log_sums, int threads);
int attention_grad(int64_t batch, int64_t groups, int64_t share, int64_t seq, int64_t dim, const float *q, const float *k,
                   const float *v, const float *bias, int64_t masks, const float *out, float *log_sums, const float *grad,
                   float *grad_q, float *grad_k, float *grad_v, int threads);
int choose(int64_t runs, int64_t n, int64_t experts, int64_t slots, int64_t least, int dynamic, const float *logits,
           const float *bias, const double *budgets, const uint8_t *real, float *restrict weights, int64_t *restrict ids,
           uint8_t *restrict active, int threads);
int spread_surprise(int64_t runs, int64_t n, int64_t left_dim, int64_t right_dim, int64_t tokens, int64_t experts, int is_signed,
                    const float *left, const float *right, const int64_t *token, const int64_t *expert,
                    float *restrict surface, int threads);
int cross_entropy(int64_t n, int64_t vocab, int64_t none, const float *logits, const int64_t *labels, float *restrict losses,
                  float *restrict entropies, int64_t *restrict best, float *restrict log_sums, int threads);
int cross_entropy_grad(int64_t n, int64_t vocab, int64_t none, const float *grads, const float *logits, const int64_t *labels,
                       const int64_t *best, const float *log_sums, float *restrict out, int threads);
int router_sums(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, const float *logits, const int64_t *target,
                const uint8_t *informative, const uint8_t *real, float *restrict picked, float *restrict mass,
                float *restrict squares, int threads);
int router_sums_grad(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, const float *logits,
                     const int64_t *target, const uint8_t *informative, const uint8_t *real, const float *grad_picked,
                     const float *grad_mass, const float *grad_squares, float *restrict out, int threads);
int routing_sums(int64_t runs, int64_t layers, int64_t tokens, int64_t experts, int64_t slots, const float *logits,
                 const float *surprise, const int64_t *ids, const uint8_t *active, const int64_t *target,
                 const uint8_t *informative, const uint8_t *tied, const uint8_t *real, int64_t *restrict counts,
                 float *restrict chance, int64_t *restrict routed, int64_t *restrict wanted, double *restrict sizes,
                 int64_t *restrict sized, int threads);
void adamw(int64_t leaves, int64_t runs, const int64_t *counts, const float *const *numbers, float tiny,
           const float *const *params, const float *const *grads, const float *const *mu, const float *const *nu,
           float *const *new_params, float *const *new_mu, float *const *new_nu, int threads);
