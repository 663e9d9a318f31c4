// The noise kernel's interface and the coefficients that it shares with dmkd_fast/rng/philox.py.

#pragma once

#include <cstdint>

namespace dmkd {

// Fitted in Chebyshev points; largest relative error of the logarithm 1.4e-8, largest absolute
// errors of sine and cosine 2.4e-8 and 6.7e-9, all before rounding to float.
// log(1 + f) = f + f^2 * poly(f); sin(2 pi r) = r * poly(r^2); cos(2 pi r) = poly(r^2).
constexpr float kLog[9] = {-0.4999999701976776f,  0.3333333134651184f,   -0.2500078082084656f,
                           0.20001234114170074f,  -0.16626645624637604f, 0.14204855263233185f,
                           -0.13127556443214417f, 0.12722674012184143f,  -0.07673642784357071f};
constexpr float kSin[4] = {6.2831854820251465f, -41.3416633605957f, 81.59254455566406f,
                           -75.401611328125f};
constexpr float kCos[5] = {1.0f, -19.739208221435547f, 64.93931579589844f, -85.4428482055664f,
                           59.22016906738281f};
constexpr float kLn2 = 0.6931471805599453f;

struct NoiseArguments {
  const int64_t* ids;  // (B,)
  float* out;          // (B, count), contiguous
  int64_t count;
  uint64_t seed;
  uint32_t step;  // step and stream, one counter word
};

// Fills rows [begin, end).
void normal_rows(const NoiseArguments& arguments, int64_t begin, int64_t end);

}  // namespace dmkd
