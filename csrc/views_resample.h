// One axis of a resampling, and its passes over rows: widen bytes, resample, blend rows.
//
// Everything is compiled for the instruction set of the function that it is inlined into, or for
// AVX-512, where vectors are written out.

#pragma once

// GCC 12 takes the don't-care operands in its own headers for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instruction_sets.h"
#include "scalar_types.h"

#if DMKD_X86
#include <immintrin.h>
#endif

namespace dmkd {
namespace {

constexpr int64_t kSlack = 48;  // floats that vectors may read or write beyond a row

// How one axis of a crop becomes `size` pixels: pixel j is the sum over k of weights[k, j] *
// source[first[j] + k]. No tap lies beyond the crop, but for the second one of a crop of one pixel,
// whose weight is 0. Triangle filter; source pixel i and view pixel j have weight proportional
// to 2 d - |(2 i + 1) size - (2 j + 1) length|, where d is size, or length where that is more than
// 1.15 times size.
struct Axis {
  int64_t taps = 0;
  std::vector<int32_t> first;  // (size,)
  std::vector<float> weights;  // (taps, size), a tap's weights side by side

  DMKD_INLINE void set(int64_t length, int64_t size, bool reversed) {
    const int64_t d = 20 * length > 23 * size ? length : size;
    taps = d == size ? 2 : std::max<int64_t>(2, std::min(2 * length / size + 2, length));
    first.resize(size + kSlack);
    weights.resize(taps * size + kSlack);
    const int64_t latest = std::max<int64_t>(0, length - taps);
    const int64_t low = length - 2 * d - size;  // floor((low + 2 j length) / (2 size)) + 1 is first
    int64_t quotient = low / (2 * size), remainder = low % (2 * size);
    if (remainder < 0) {
      remainder += 2 * size;
      --quotient;
    }
    const int64_t step = length / size, rest = 2 * (length % size);
    double inverse = 0.5 / static_cast<double>(size);
    int64_t inverse_of = 2 * size;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t place = reversed ? size - 1 - j : j;
      const int64_t begin = std::clamp<int64_t>(quotient + 1, 0, latest);
      const int64_t centre = (2 * j + 1) * length;
      const auto share = [&](int64_t k) {
        const int64_t gap = (2 * (begin + k) + 1) * size - centre;
        return begin + k < length ? std::max<int64_t>(0, 2 * d - (gap < 0 ? -gap : gap)) : 0;
      };
      int64_t sum = 0;
      for (int64_t k = 0; k < taps; ++k) sum += share(k);
      if (sum != inverse_of) {
        inverse_of = sum;
        inverse = 1.0 / static_cast<double>(sum);
      }
      first[place] = static_cast<int32_t>(begin);
      for (int64_t k = 0; k < taps; ++k) {
        weights[k * size + place] = static_cast<float>(static_cast<double>(share(k)) * inverse);
      }
      quotient += step;
      remainder += rest;
      if (remainder >= 2 * size) {
        remainder -= 2 * size;
        ++quotient;
      }
    }
  }
};

// scale * pixel + shift of `count` pixels.
template <bool has_fma>
DMKD_INLINE void widen_line(const uint8_t* __restrict in, float* __restrict out, int64_t count,
                            float scale, float shift) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = multiply_add<has_fma>(static_cast<float>(in[i]), scale, shift);
  }
}

// Resamples one channel: out[j * stride] = sum_k weights[k, j] * line[first[j] + k].
template <bool has_fma>
DMKD_INLINE void resample_line(const Axis& axis, const float* __restrict line,
                               float* __restrict out, int64_t size, int64_t stride) {
  const int32_t* __restrict first = axis.first.data();
  for (int64_t j = 0; j < size; ++j) {
    const float* source = line + first[j];
    float sum = axis.weights[j] * source[0];
    for (int64_t k = 1; k < axis.taps; ++k) {
      sum = multiply_add<has_fma>(axis.weights[k * size + j], source[k], sum);
    }
    out[j * stride] = sum;
  }
}

// out[i] = sum_k weight(k) * sources[k][i]: the vertical pass, and the cast.
template <bool has_fma, typename scalar_t>
DMKD_INLINE void blend(const float* const* sources, const float* weights, int64_t stride,
                       int64_t taps, scalar_t* __restrict out, int64_t count) {
  constexpr int64_t block = 64;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t here = std::min(block, count - begin);
    float sums[block];
    const float* __restrict source = sources[0] + begin;
    for (int64_t i = 0; i < here; ++i) sums[i] = weights[0] * source[i];
    for (int64_t k = 1; k < taps; ++k) {
      const float w = weights[k * stride];
      source = sources[k] + begin;
      for (int64_t i = 0; i < here; ++i) sums[i] = multiply_add<has_fma>(w, source[i], sums[i]);
    }
    for (int64_t i = 0; i < here; ++i) narrow(out + begin + i, sums[i]);
  }
}

#if DMKD_X86
#define DMKD_AVX512 __attribute__((target(DMKD_AVX512_TARGET)))

// resample_line by vectors of 16 pixels, three channels interleaved where there are three. The
// sources of 16 neighbours lie within 32 floats if there are two taps, so two registers are the
// table of a permutation, which takes the place of a gather.
template <int channels>
DMKD_AVX512 void resample_lines_avx512(const Axis& axis, const float* lines, int64_t line_stride,
                                       float* out, int64_t size) {
  const __m512i spread[3][2] = {
      {_mm512_setr_epi32(0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5),
       _mm512_setr_epi32(0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15)},
      {_mm512_setr_epi32(21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26),
       _mm512_setr_epi32(0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15)},
      {_mm512_setr_epi32(0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0),
       _mm512_setr_epi32(26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31)}};
  for (int64_t j = 0; j < size; j += 16) {
    const int64_t here = std::min<int64_t>(16, size - j);
    const auto mask = static_cast<__mmask16>((1u << here) - 1u);
    const int32_t* first = axis.first.data() + j;
    check_read(first, here);
    __m512 sums[channels];
    if (axis.taps == 2) {
      const int32_t base = std::min(first[0], first[here - 1]);
      const __m512i places =
          _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, first), _mm512_set1_epi32(base));
      const __m512i next = _mm512_add_epi32(places, _mm512_set1_epi32(1));
      check_read(axis.weights.data() + j, here);
      check_read(axis.weights.data() + size + j, here);
      const __m512 w0 = _mm512_maskz_loadu_ps(mask, axis.weights.data() + j);
      const __m512 w1 = _mm512_maskz_loadu_ps(mask, axis.weights.data() + size + j);
      for (int c = 0; c < channels; ++c) {
        const float* source = lines + c * line_stride + base;
        const __m512 low = _mm512_loadu_ps(source), high = _mm512_loadu_ps(source + 16);
        sums[c] = _mm512_fmadd_ps(w1, _mm512_permutex2var_ps(low, next, high),
                                  _mm512_mul_ps(w0, _mm512_permutex2var_ps(low, places, high)));
      }
    } else {
      for (int c = 0; c < channels; ++c) sums[c] = _mm512_setzero_ps();
      const __m512i places = _mm512_maskz_loadu_epi32(mask, first);
      for (int64_t k = 0; k < axis.taps; ++k) {
        check_read(axis.weights.data() + k * size + j, here);
        const __m512 w = _mm512_maskz_loadu_ps(mask, axis.weights.data() + k * size + j);
        for (int c = 0; c < channels; ++c) {
          const float* source = lines + c * line_stride + k;
          for (int64_t i = 0; i < here; ++i) check_read(source + first[i], 1);
          const __m512 taps =
              _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places, source, 4);
          sums[c] = _mm512_fmadd_ps(w, taps, sums[c]);
        }
      }
    }
    if constexpr (channels == 1) {
      _mm512_storeu_ps(out + j, sums[0]);
    } else {
      for (int part = 0; part < 3; ++part) {
        const __m512 two = _mm512_permutex2var_ps(sums[0], spread[part][0], sums[1]);
        const __m512 all = _mm512_permutex2var_ps(two, spread[part][1], sums[2]);
        _mm512_storeu_ps(out + 3 * j + 16 * part, all);
      }
    }
  }
}

template <typename scalar_t>
DMKD_AVX512 DMKD_INLINE void store_avx512(scalar_t* out, __m512 value, __mmask16 mask);

template <>
DMKD_AVX512 DMKD_INLINE void store_avx512(float* out, __m512 value, __mmask16 mask) {
  check_write(out, __builtin_popcount(mask));
  _mm512_mask_storeu_ps(out, mask, value);
}

template <>
DMKD_AVX512 DMKD_INLINE void store_avx512(Half* out, __m512 value, __mmask16 mask) {
  check_write(out, __builtin_popcount(mask));
  _mm256_mask_storeu_epi16(out, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

template <>
DMKD_AVX512 DMKD_INLINE void store_avx512(BFloat16* out, __m512 value, __mmask16 mask) {
  check_write(out, __builtin_popcount(mask));
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_mask_storeu_epi16(out, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <typename scalar_t>
DMKD_AVX512 void blend_avx512(const float* const* sources, const float* weights, int64_t stride,
                              int64_t taps, scalar_t* out, int64_t count) {
  const __m512 w0 = _mm512_set1_ps(weights[0]), w1 = _mm512_set1_ps(weights[stride]);
  const float *source0 = sources[0], *source1 = sources[1];
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t here = std::min<int64_t>(16, count - i);
    const auto mask = static_cast<__mmask16>((1u << here) - 1u);
    __m512 sum = _mm512_fmadd_ps(w1, _mm512_loadu_ps(source1 + i),
                                 _mm512_mul_ps(w0, _mm512_loadu_ps(source0 + i)));
    for (int64_t k = 2; k < taps; ++k) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k * stride]), _mm512_loadu_ps(sources[k] + i),
                            sum);
    }
    store_avx512(out + i, sum, mask);
  }
}
#endif  // DMKD_X86

}  // namespace
}  // namespace dmkd
