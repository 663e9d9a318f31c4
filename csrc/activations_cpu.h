// Elementwise pieces of a transformer that PyTorch runs far below memory speed on a CPU.

#pragma once

#include <cstdint>

namespace dmkd {

// Rows [begin, end) of out = gelu_tanh(in + bias), each `columns` long, contiguous, bfloat16 bits
// or float; bias (columns,). `in` and `out` may be the same.
void gelu_tanh(const void* in, const void* bias, void* out, int64_t begin, int64_t end,
               int64_t columns, bool bfloat16);

// Rows [begin, end) of out = softmax(scale * in), each `columns` long, contiguous, bfloat16 bits or
// float. `in` and `out` may be the same.
void softmax_rows(const void* in, void* out, int64_t begin, int64_t end, int64_t columns,
                  float scale, bool bfloat16);

}  // namespace dmkd
