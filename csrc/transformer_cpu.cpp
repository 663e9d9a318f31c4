// Gelu (tanh form), residual sum with modulated norm, and the choice of instructions.
//
// PyTorch's tanh and exp are slow on a CPU: its gelu of 4.8 M bfloat16 numbers took 8.9 ms on a
// thread that copied them in 0.7. In bfloat16 a reciprocal and an exponential of 13 bits are enough
// (the results keep 8); float32 gets full accuracy.

// Products and sums may be fused in this file, unlike elsewhere: nothing here must be exactly zero.
#pragma GCC optimize("fp-contract=fast")

#include "transformer_cpu.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "instruction_sets.h"
#include "scalar_types.h"
#include "transformer_avx512.h"

namespace dmkd {
namespace {

// A constant that the compiler does not know: otherwise GCC clamps by branches, follows each with
// the constant folded in and merges the results by masks, which is four times slower.
DMKD_INLINE float hidden(float value) {
  asm("" : "+m"(value));
  return value;
}

struct Bounds {
  float low = hidden(-87.0f), high = hidden(89.0f);  // the result at 89 is infinity
};

// exp(x) to 2 ulp for -87 <= x <= 88; the result of the bounds beyond them. NaN stays NaN.
DMKD_INLINE float fast_exp(float x, const Bounds& bounds) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > bounds.high ? bounds.high : x;
  x = x < bounds.low ? bounds.low : x;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691e-4f;
  poly = poly * r + 1.3981999e-3f;
  poly = poly * r + 8.3334519e-3f;
  poly = poly * r + 4.1665796e-2f;
  poly = poly * r + 1.6666665e-1f;
  poly = poly * r + 5.0000001e-1f;
  poly = poly * (r * r) + (r + 1.0f);
  return poly * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

template <typename scalar_t>
struct GeluWork {
  const scalar_t* in;
  const scalar_t* bias;
  scalar_t* out;
  int64_t begin, end, columns;
};

// y = x + bias; y / 2 * (1 + tanh(u)) = y / (1 + exp(-2 u)), u = sqrt(2 / pi) * (y + 0.044715 y^3).
template <typename scalar_t>
DMKD_INLINE void gelu(const GeluWork<scalar_t>& work) {
  const Bounds bounds;
  const int64_t columns = work.columns;
  const scalar_t* bias = work.bias;
  for (int64_t r = work.begin; r < work.end; ++r) {
    const scalar_t* source = work.in + r * columns;
    scalar_t* target = work.out + r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const float y = widen<float>(source[i]) + widen<float>(bias[i]);
      const float twice_u = y * (kGeluLinear + kGeluCubic * (y * y));
      narrow(target + i, y / (1.0f + fast_exp(-twice_u, bounds)));
    }
  }
}

template <typename scalar_t>
DMKD_INLINE void norm(const ResidualNorm& w, int64_t begin, int64_t end) {
  const int64_t n = w.columns;
  thread_local std::vector<float> scratch;
  scratch.resize(n);
  float* __restrict row = scratch.data();
  const auto at = [](const void* base, int64_t offset) {
    return static_cast<const scalar_t*>(base) + offset;
  };
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / w.tokens;
    const scalar_t* x = at(w.x, r * n);
    const scalar_t* shift = at(w.shift, image * w.shift_stride);
    const scalar_t* scale = at(w.scale, image * w.scale_stride);
    scalar_t* normed = static_cast<scalar_t*>(w.normed) + r * n;
    float sum = 0.0f;
    if (w.branch != nullptr) {
      const scalar_t* branch = at(w.branch, r * n);
      const scalar_t* gate = at(w.gate, image * w.gate_stride);
      const scalar_t* bias = static_cast<const scalar_t*>(w.bias);
      scalar_t* x_out = static_cast<scalar_t*>(w.x_out) + r * n;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const float added = bias == nullptr ? 0.0f : widen<float>(bias[i]);
        narrow(x_out + i,
               widen<float>(x[i]) + widen<float>(gate[i]) * (widen<float>(branch[i]) + added));
        row[i] = widen<float>(x_out[i]);  // rounded, as the next block will see it
        sum += row[i];
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        row[i] = widen<float>(x[i]);
        sum += row[i];
      }
    }
    const float mean = sum / n;
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; ++i) square += (row[i] - mean) * (row[i] - mean);
    const float inverse = 1.0f / std::sqrt(square / n + w.eps);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float value = (row[i] - mean) * inverse;
      narrow(normed + i, value + value * widen<float>(scale[i]) + widen<float>(shift[i]));
    }
  }
}

// The same loops for three instruction sets.
#define DMKD_FOR(suffix, attributes)                                               \
  attributes void gelu_##suffix(const GeluWork<float>& work) { gelu(work); }       \
  attributes void gelu_##suffix(const GeluWork<BFloat16>& work) { gelu(work); }    \
  attributes void norm_##suffix(const ResidualNorm& w, int64_t begin, int64_t end, \
                                bool bfloat16) {                                   \
    bfloat16 ? norm<BFloat16>(w, begin, end) : norm<float>(w, begin, end);         \
  }
DMKD_FOR(avx512, DMKD_FLATTEN_AVX512)
DMKD_FOR(avx2, DMKD_FLATTEN_AVX2)
DMKD_FOR(baseline, __attribute__((flatten)))
#undef DMKD_FOR

template <typename scalar_t>
void run_gelu(const GeluWork<scalar_t>& work) {
  using Run = void(const GeluWork<scalar_t>&);
  static const auto run = best_of<Run>(gelu_baseline, gelu_avx2, gelu_avx512);
  run(work);
}

}  // namespace

void gelu_tanh(const void* in, const void* bias, void* out, int64_t begin, int64_t end,
               int64_t columns, bool bfloat16) {
  const auto work = [&]<typename scalar_t>(scalar_t) {
    return GeluWork<scalar_t>{static_cast<const scalar_t*>(in),
                              static_cast<const scalar_t*>(bias),
                              static_cast<scalar_t*>(out),
                              begin,
                              end,
                              columns};
  };
  if (!bfloat16) return run_gelu(work(0.0f));
#if DMKD_X86
  if (can_attend(bfloat16)) return avx512::gelu(in, bias, out, begin, end, columns);
#endif
  run_gelu(work(BFloat16{}));
}

void residual_norm(const ResidualNorm& work, int64_t begin, int64_t end, bool bfloat16) {
#if DMKD_X86
  if (bfloat16 && can_attend(bfloat16)) return avx512::residual_norm(work, begin, end);
#endif
  static const auto run = best_of(norm_baseline, norm_avx2, norm_avx512);
  run(work, begin, end, bfloat16);
}

bool can_attend(bool bfloat16) {
  return best_isa() >= (bfloat16 ? Isa::kAvx512Bf16 : Isa::kAvx512);
}

#if DMKD_X86
void attention(const Attention& work, int64_t begin, int64_t end, bool bfloat16) {
  bfloat16 ? avx512::attention_bfloat16(work, begin, end)
           : avx512::attention_float(work, begin, end);
}
#else
void attention(const Attention&, int64_t, int64_t, bool) {}  // can_attend is false
#endif

}  // namespace dmkd
