// Arithmetic on one element that vectorises for any target: dtype conversions, 2^x, the divergence.
//
// Everything is branch-free and forced inline: the including file compiles the same loops for
// several instruction sets by function attributes. Compiled with -ffp-contract=off, so that a
// product is rounded before it is subtracted (q - p is exactly 0 for equal logits); where a fused
// multiply-add is wanted, `multiply_add` says so.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace dmkd {

#define DMKD_INLINE inline __attribute__((always_inline))
#define DMKD_LAMBDA __attribute__((always_inline))

// AddressSanitizer does not see what masked and gathering vector instructions touch: sanitized
// builds (tests/sanitized.py) check these addresses here.
#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_loadN(void*, unsigned long);
extern "C" void __asan_storeN(void*, unsigned long);
template <typename T>
DMKD_INLINE void check_read(const T* data, int64_t count) {
  __asan_loadN(const_cast<T*>(data), count * sizeof(T));
}
template <typename T>
DMKD_INLINE void check_write(T* data, int64_t count) {
  __asan_storeN(data, count * sizeof(T));
}
#else
template <typename T>
DMKD_INLINE void check_read(const T*, int64_t) {}
template <typename T>
DMKD_INLINE void check_write(T*, int64_t) {}
#endif

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

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

template <typename compute_t, typename scalar_t>
DMKD_INLINE compute_t widen(scalar_t value) {
  return static_cast<compute_t>(value);
}

template <typename compute_t>
DMKD_INLINE compute_t widen(BFloat16 value) {
  return static_cast<compute_t>(bits_to_float(static_cast<uint32_t>(value.bits) << 16));
}

template <typename compute_t>
DMKD_INLINE compute_t widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The product moves the exponent's bias and makes subnormal numbers normal.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return static_cast<compute_t>(
      bits_to_float(bits | (static_cast<uint32_t>(value.bits & 0x8000u) << 16)));
}

template <typename scalar_t, typename compute_t>
DMKD_INLINE void narrow(scalar_t* target, compute_t value) {
  *target = static_cast<scalar_t>(value);
}

// Both 16-bit types round to nearest, ties to even. From double they round twice (by way of
// float), as torch's own conversion does.
template <typename compute_t>
DMKD_INLINE void narrow(BFloat16* target, compute_t value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  target->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

template <typename compute_t>
DMKD_INLINE void narrow(Half* target, compute_t value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 1/2 rounds at its last bit.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  target->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

// x * y + z; rounded once where the target has the instruction.
template <bool has_fma, typename compute_t>
DMKD_INLINE compute_t multiply_add(compute_t x, compute_t y, compute_t z) {
  if constexpr (!has_fma) {
    return x * y + z;
  } else if constexpr (sizeof(compute_t) == sizeof(float)) {
    return __builtin_fmaf(x, y, z);
  } else {
    return __builtin_fma(x, y, z);
  }
}

// A number in two parts, so that a product with it is not rounded twice.
template <typename compute_t>
struct Pair {
  compute_t high, low;

  Pair() = default;
  explicit Pair(double value)
      : high(static_cast<compute_t>(value)),
        low(static_cast<compute_t>(value - static_cast<double>(high))) {}
};

// x * y.
template <bool has_fma, typename compute_t>
DMKD_INLINE compute_t times(compute_t x, const Pair<compute_t>& y) {
  return multiply_add<has_fma>(x, y.high, x * y.low);
}

// The factor of `exp_scaled`, in units of log 2, and the x below which the result is 0.
template <typename compute_t>
struct Exponent {
  Pair<compute_t> scale;
  compute_t lowest;

  explicit Exponent(double factor)
      : scale(factor * 1.44269504088896340736), lowest(compute_t(-127) / scale.high) {}
};

// exp(x * factor) for x * factor <= 0. Relative error 9e-8: 2^n * P(f), P minimax of degree 6 on
// [-1/2, 1/2] with P(0) = 1. Exactly 0 below 2^-127; NaN stays NaN.
template <bool has_fma>
DMKD_INLINE float exp_scaled(float x, const Exponent<float>& exponent) {
  constexpr float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding rounds; 127: exponent's bias
  const float clamped = exponent.lowest > x ? exponent.lowest : x;  // in this order a NaN passes
  const float shifted = multiply_add<has_fma>(clamped, exponent.scale.high, magic);
  float f = multiply_add<has_fma>(clamped, exponent.scale.high, -(shifted - magic));
  f = multiply_add<has_fma>(clamped, exponent.scale.low, f);
  float poly = 0x1.41fbbcp-13f;
  poly = multiply_add<has_fma>(poly, f, 0x1.5f3e52p-10f);
  poly = multiply_add<has_fma>(poly, f, 0x1.3b2d4cp-7f);
  poly = multiply_add<has_fma>(poly, f, 0x1.c6aee8p-5f);
  poly = multiply_add<has_fma>(poly, f, 0x1.ebfbdcp-3f);
  poly = multiply_add<has_fma>(poly, f, 0x1.62e430p-1f);
  poly = multiply_add<has_fma>(poly, f, 1.0f);
  return poly * bits_to_float(float_to_bits(shifted) << 23);
}

template <bool has_fma>
DMKD_INLINE double exp_scaled(double x, const Exponent<double>& exponent) {
  return std::exp(x * (exponent.scale.high * 0.69314718055994530942));
}

// (e^-d - 1 + d) / d^2 where |d| < 1/2, minimax of degree 5 (2e-8).
template <bool has_fma>
DMKD_INLINE float excess_series(float d) {
  float series = -1.98756289e-4f;
  series = multiply_add<has_fma>(series, d, 1.39819970e-3f);
  series = multiply_add<has_fma>(series, d, -8.33345205e-3f);
  series = multiply_add<has_fma>(series, d, 4.16657962e-2f);
  series = multiply_add<has_fma>(series, d, -0.166666657f);
  return multiply_add<has_fma>(series, d, 0.5f);
}

// One class's share of KL(p || q), p * (expm1(-d) + d) with d = log p - log q, and q - p.
//
// Where |d| < 1/2 the first comes from `excess_series`. So does the second where |d| < near_limit:
// p * expm1(-d) keeps its digits however close student and teacher are, which the difference of two
// rounded softmaxes does not. Elsewhere nothing cancels.
template <bool has_fma, typename compute_t>
DMKD_INLINE void divergence(compute_t p, compute_t q, compute_t d, compute_t near_limit,
                            compute_t& term, compute_t& difference) {
  compute_t near, near_difference;
  const compute_t pd = p * d;
  if constexpr (sizeof(compute_t) == sizeof(float)) {
    near = pd * (d * excess_series<has_fma>(d));
    near_difference = near - pd;
  } else {
    near_difference = p * std::expm1(-d);
    near = p * (std::expm1(-d) + d);
  }
  const compute_t far_difference = q - p;
  difference = std::abs(d) < near_limit ? near_difference : far_difference;
  term = std::abs(d) < compute_t(0.5) ? near : far_difference + pd;
}

}  // namespace dmkd
