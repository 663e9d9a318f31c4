// What stands between a transformer's matrix products, on CPUs: attention, gelu, residual and norm.
//
// All tensors are contiguous unless a stride is named, and hold float or bfloat16 bits.

#pragma once

#include <cstdint>

namespace dmkd {

// Rows [begin, end) of out = gelu_tanh(in + bias), each `columns` long; bias (columns,).
void gelu_tanh(const void* in, const void* bias, void* out, int64_t begin, int64_t end,
               int64_t columns, bool bfloat16);

// Rows (image, token) of a residual sum and its modulated norm:
//   x_out = x + gate * (branch + bias); normed = layer_norm(x_out) * (1 + scale) + shift.
// Without a branch x_out = x and is not written.
struct ResidualNorm {
  const void* x;       // (rows, columns)
  const void* branch;  // (rows, columns), or null
  const void* bias;    // (columns,), or null for zeros
  const void* gate;    // one row per image, `gate_stride` apart, and so on
  const void* shift;
  const void* scale;
  void* x_out;   // (rows, columns)
  void* normed;  // (rows, columns)
  int64_t columns, tokens, gate_stride, shift_stride, scale_stride;
  float eps;
};

void residual_norm(const ResidualNorm& work, int64_t begin, int64_t end, bool bfloat16);

// out = softmax(q k^T / sqrt(head_dim)) v for every image and head, q, k, v = qkv + bias.
struct Attention {
  const void* qkv;   // (images, tokens, 3, heads, head_dim)
  const void* bias;  // (3, heads, head_dim), or null for zeros
  void* out;         // (images, tokens, heads, head_dim)
  int64_t tokens, heads, head_dim;
};

// Whether this CPU has the instructions of `attention`.
bool can_attend(bool bfloat16);

// (image, head) pairs [begin, end), heads fastest. head_dim must be even.
void attention(const Attention& work, int64_t begin, int64_t end, bool bfloat16);

}  // namespace dmkd
