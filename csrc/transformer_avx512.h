// The AVX-512 kernels that transformer_cpu.cpp chooses where the CPU has them; bfloat16 also takes
// AVX512-BF16. Arguments as in transformer_cpu.h.

#pragma once

#include <cstdint>

#include "transformer_cpu.h"

namespace dmkd {

// 2 u = y * (linear + cubic * y^2), see gelu_tanh.
constexpr float kGeluLinear = 1.5957691216f, kGeluCubic = 0.0713548163f;

namespace avx512 {

void gelu(const void* in, const void* bias, void* out, int64_t begin, int64_t end, int64_t columns);
void residual_norm(const ResidualNorm& work, int64_t begin, int64_t end);
void attention_bfloat16(const Attention& work, int64_t begin, int64_t end);
void attention_float(const Attention& work, int64_t begin, int64_t end);

}  // namespace avx512
}  // namespace dmkd
