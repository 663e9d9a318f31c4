// Standard normal numbers keyed by (seed, image id, step): Philox4x32-10, then Box-Muller.
//
// The bits are those of dmkd_fast/rng/philox.py and of its Triton kernel: logarithm, sine and
// cosine are polynomials of separately rounded products and sums (-ffp-contract=off in setup.py),
// so no two machines differ.

#include "noise_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "instruction_sets.h"
#include "scalar_types.h"

namespace dmkd {
namespace {

constexpr int kBlocks = 16;  // Philox blocks of four words computed side by side

// log(u) for u in (0, 1]: exponent and, for the mantissa m in [sqrt(1/2), sqrt(2)), a polynomial in
// m - 1.
DMKD_INLINE float log_unit(float u) {
  const uint32_t bits = float_to_bits(u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float poly = kLog[8];
  for (int i = 7; i >= 0; --i) {
    poly = poly * f + kLog[i];
  }
  return (f + (f * f) * poly) + static_cast<float>(exponent) * kLn2;
}

// Two normal numbers from two words.
DMKD_INLINE void box_muller(uint32_t first, uint32_t second, float* z0, float* z1) {
  const float u = (static_cast<float>(static_cast<int32_t>(first >> 8)) + 0.5f) * 0x1p-24f;
  const float radius = std::sqrt(-2.0f * log_unit(u));
  // The angle in turns is quadrant / 4 + r with |r| <= 1/8.
  const int32_t n = static_cast<int32_t>(second >> 8);
  const int32_t quadrant = (n + (1 << 21)) >> 22;
  const float r = (static_cast<float>(n - (quadrant << 22)) + 0.5f) * 0x1p-24f;
  const float z = r * r;
  const float sine = r * (((kSin[3] * z + kSin[2]) * z + kSin[1]) * z + kSin[0]);
  const float cosine = (((kCos[4] * z + kCos[3]) * z + kCos[2]) * z + kCos[1]) * z + kCos[0];
  const bool odd = (quadrant & 1) != 0;
  const float c = odd ? sine : cosine;
  const float s = odd ? cosine : sine;
  *z0 = radius * (((quadrant + 1) & 2) != 0 ? -c : c);
  *z1 = radius * ((quadrant & 2) != 0 ? -s : s);
}

DMKD_INLINE void fill_row(const NoiseArguments& a, int64_t row) {
  const auto id = static_cast<uint64_t>(a.ids[row]);
  float* out = a.out + row * a.count;
  for (int64_t first = 0; first < a.count; first += 4 * kBlocks) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      c0[i] = static_cast<uint32_t>(id);
      c1[i] = static_cast<uint32_t>(id >> 32);
      c2[i] = a.step;
      c3[i] = static_cast<uint32_t>(first / 4 + i);
    }
    auto k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kBlocks; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    float z[4][kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      box_muller(c0[i], c1[i], &z[0][i], &z[1][i]);
      box_muller(c2[i], c3[i], &z[2][i], &z[3][i]);
    }
    const int64_t here = std::min<int64_t>(4 * kBlocks, a.count - first);
    for (int64_t i = 0; i < here; ++i) {
      out[first + i] = z[i % 4][i / 4];
    }
  }
}

DMKD_INLINE void fill_rows(const NoiseArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    fill_row(a, row);
  }
}

DMKD_FLATTEN_AVX512 void rows_avx512(const NoiseArguments& a, int64_t begin, int64_t end) {
  fill_rows(a, begin, end);
}

DMKD_FLATTEN_AVX2 void rows_avx2(const NoiseArguments& a, int64_t begin, int64_t end) {
  fill_rows(a, begin, end);
}

void rows_baseline(const NoiseArguments& a, int64_t begin, int64_t end) {
  fill_rows(a, begin, end);
}

}  // namespace

void normal_rows(const NoiseArguments& arguments, int64_t begin, int64_t end) {
  static const auto run = best_of(rows_baseline, rows_avx2, rows_avx512);
  run(arguments, begin, end);
}

}  // namespace dmkd
