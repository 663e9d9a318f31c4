// Elementwise pieces of a transformer that PyTorch runs far below memory speed on a CPU.

#pragma once

#include <cstdint>

namespace dmkd {

// out[i] = gelu_tanh(in[i]), bfloat16 bits or float. `in` and `out` may be the same.
void gelu_tanh(const void* in, void* out, int64_t begin, int64_t end, bool bfloat16);

// Rows [begin, end) of out = softmax(scale * in), each `columns` long, contiguous, bfloat16 bits or
// float. `in` and `out` may be the same.
void softmax_rows(const void* in, void* out, int64_t begin, int64_t end, int64_t columns,
                  float scale, bool bfloat16);

}  // namespace dmkd
