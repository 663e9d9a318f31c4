// Distillation loss T^2 * KL(softmax(t / T) || softmax(s / T)) and its gradient, row by row.
//
// One row is read twice from cache: maxima, then exponentials into scratch (2 C values that stay in
// L1/L2), then loss and gradient from the scratch. Rows are independent and each has a fixed order
// of operations, so the result does not depend on the number of threads.
// B rows, C classes. Definition: dmkd_fast/ops/reference.py.

#include "kd_loss_cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace dmkd {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#define DMKD_INLINE inline __attribute__((always_inline))

DMKD_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

DMKD_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Loads and stores: bfloat16 by shifts, which vectorise, half by its own conversions.
template <typename scalar_t, typename compute_t>
DMKD_INLINE compute_t load(const scalar_t* source) {
  return static_cast<compute_t>(*source);
}

template <>
DMKD_INLINE float load<BFloat16, float>(const BFloat16* source) {
  return bits_to_float(static_cast<uint32_t>(source->x) << 16);
}

template <typename scalar_t, typename compute_t>
DMKD_INLINE void store(scalar_t* target, compute_t value) {
  *target = static_cast<scalar_t>(value);
}

template <>
DMKD_INLINE void store<BFloat16, float>(BFloat16* target, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t nan = (bits >> 16) | 0x40u;
  target->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// exp(x) for x <= 0 with less than 1.5 ulp error: 2^n * P(r). Zero below the smallest normal
// number, NaN stays NaN. Branch-free, so loops around it vectorise for whatever the caller's target
// has.
DMKD_INLINE float exp_nonpositive(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
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
  const float scale = bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
  return x < -87.0f ? 0.0f : poly * scale;
}

DMKD_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// p * (expm1(-d) + d) with d = log p - log q. The difference q - p + p * d loses its digits as d ->
// 0 (relative error 2e-6 at d = 1/4); there the series, p d^2 (1/2! - d/3! + ... + d^8/10!), does
// not.
template <typename compute_t>
DMKD_INLINE compute_t divergence(compute_t p, compute_t q, compute_t d) {
  const compute_t far = (q - p) + p * d;
  compute_t series = compute_t(1.0 / 3628800);
  series = compute_t(1.0 / 362880) - series * d;
  series = compute_t(1.0 / 40320) - series * d;
  series = compute_t(1.0 / 5040) - series * d;
  series = compute_t(1.0 / 720) - series * d;
  series = compute_t(1.0 / 120) - series * d;
  series = compute_t(1.0 / 24) - series * d;
  series = compute_t(1.0 / 6) - series * d;
  series = compute_t(0.5) - series * d;
  const compute_t near = p * (d * d) * series;
  const compute_t term = std::abs(d) < compute_t(1) ? near : far;
  return p == compute_t(0) ? q : term;  // 0 * log 0 = 0
}

template <>
DMKD_INLINE double divergence<double>(double p, double q, double d) {
  const double term = std::abs(d) < 1.0 ? p * (std::expm1(-d) + d) : (q - p) + p * d;
  return p == 0.0 ? q : term;
}

template <typename scalar_t, typename compute_t, bool with_loss, bool with_grad>
DMKD_INLINE compute_t row(const scalar_t* __restrict student, const scalar_t* __restrict teacher,
                          scalar_t* __restrict grad, compute_t* __restrict scratch, int64_t classes,
                          compute_t inverse_temperature, compute_t grad_scale) {
  constexpr compute_t lowest = -std::numeric_limits<compute_t>::infinity();
  compute_t* __restrict student_exp = scratch;
  compute_t* __restrict teacher_exp = scratch + classes;

  compute_t student_max = lowest, teacher_max = lowest;
#pragma omp simd reduction(max : student_max, teacher_max)
  for (int64_t i = 0; i < classes; ++i) {
    const compute_t s = load<scalar_t, compute_t>(student + i);
    const compute_t t = load<scalar_t, compute_t>(teacher + i);
    student_max = s > student_max ? s : student_max;
    teacher_max = t > teacher_max ? t : teacher_max;
  }

  compute_t student_sum = 0, teacher_sum = 0;
#pragma omp simd reduction(+ : student_sum, teacher_sum)
  for (int64_t i = 0; i < classes; ++i) {
    const compute_t s = load<scalar_t, compute_t>(student + i);
    const compute_t t = load<scalar_t, compute_t>(teacher + i);
    const compute_t es = exp_nonpositive((s - student_max) * inverse_temperature);
    const compute_t et = exp_nonpositive((t - teacher_max) * inverse_temperature);
    student_exp[i] = es;
    teacher_exp[i] = et;
    student_sum += es;
    teacher_sum += et;
  }

  const compute_t student_inverse = compute_t(1) / student_sum;
  const compute_t teacher_inverse = compute_t(1) / teacher_sum;
  // log p - log q = (t - s) / T + offset; the maxima are part of the offset.
  const compute_t offset = std::log(student_sum) - std::log(teacher_sum);
  // In a loop of its own, so that the products are rounded before they are subtracted: contracted
  // into the subtraction, q - p would not be zero for equal logits.
#pragma omp simd
  for (int64_t i = 0; i < classes; ++i) {
    student_exp[i] *= student_inverse;
    teacher_exp[i] *= teacher_inverse;
  }

  compute_t loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < classes; ++i) {
    const compute_t q = student_exp[i];
    const compute_t p = teacher_exp[i];
    if constexpr (with_loss) {
      const compute_t s = load<scalar_t, compute_t>(student + i);
      const compute_t t = load<scalar_t, compute_t>(teacher + i);
      const compute_t d = ((t - teacher_max) - (s - student_max)) * inverse_temperature + offset;
      loss += divergence<compute_t>(p, q, d);
    }
    if constexpr (with_grad) {
      store<scalar_t, compute_t>(grad + i, (q - p) * grad_scale);
    }
  }
  return loss;
}

template <typename scalar_t, typename compute_t, bool with_loss, bool with_grad>
DMKD_INLINE void rows(const KdArguments& a, int64_t begin, int64_t end) {
  thread_local std::vector<compute_t> scratch;
  scratch.resize(2 * a.classes);
  const compute_t temperature = static_cast<compute_t>(a.temperature);
  for (int64_t i = begin; i < end; ++i) {
    const auto* student = static_cast<const scalar_t*>(a.student) + i * a.student_stride;
    const auto* teacher = static_cast<const scalar_t*>(a.teacher) + i * a.teacher_stride;
    auto* grad = with_grad ? static_cast<scalar_t*>(a.grad) + i * a.classes : nullptr;
    // Each row's gradient is T * (q - p) * row_grad, in one factor, rounded once.
    const compute_t scale =
        with_grad ? temperature * static_cast<const compute_t*>(a.row_grad)[i * a.row_grad_stride]
                  : 0;
    const compute_t loss = row<scalar_t, compute_t, with_loss, with_grad>(
        student, teacher, grad, scratch.data(), a.classes, compute_t(1) / temperature, scale);
    if constexpr (with_loss) {
      static_cast<compute_t*>(a.loss)[i] = temperature * temperature * loss;
    }
  }
}

template <typename scalar_t, typename compute_t>
DMKD_INLINE void dispatch_outputs(const KdArguments& a, int64_t begin, int64_t end) {
  if (a.loss != nullptr && a.grad != nullptr) {
    rows<scalar_t, compute_t, true, true>(a, begin, end);
  } else if (a.loss != nullptr) {
    rows<scalar_t, compute_t, true, false>(a, begin, end);
  } else {
    rows<scalar_t, compute_t, false, true>(a, begin, end);
  }
}

DMKD_INLINE void dispatch_dtype(const KdArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case ScalarKind::kFloat:
      return dispatch_outputs<float, float>(a, begin, end);
    case ScalarKind::kDouble:
      return dispatch_outputs<double, double>(a, begin, end);
    case ScalarKind::kBFloat16:
      return dispatch_outputs<BFloat16, float>(a, begin, end);
    case ScalarKind::kHalf:
      return dispatch_outputs<Half, float>(a, begin, end);
  }
}

// The same code compiled three times; the machine decides at run time. `flatten` pulls everything
// into the function that carries the target attribute.
__attribute__((
    flatten,
    target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))) void
run_avx512(const KdArguments& a, int64_t begin, int64_t end) {
  dispatch_dtype(a, begin, end);
}

__attribute__((flatten, target("avx2,fma,f16c"))) void run_avx2(const KdArguments& a, int64_t begin,
                                                                int64_t end) {
  dispatch_dtype(a, begin, end);
}

void run_scalar(const KdArguments& a, int64_t begin, int64_t end) { dispatch_dtype(a, begin, end); }

}  // namespace

const char* kd_loss_instruction_set() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : "scalar";
}

void kd_loss_rows(const KdArguments& arguments, int64_t begin, int64_t end) {
  using Run = void (*)(const KdArguments&, int64_t, int64_t);
  static const Run run = [] {
    const std::string name = kd_loss_instruction_set();
    return name == "avx512" ? run_avx512 : name == "avx2" ? run_avx2 : run_scalar;
  }();
  run(arguments, begin, end);
}

}  // namespace dmkd
