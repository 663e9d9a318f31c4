// Transformer pieces in AVX-512 intrinsics: bfloat16 gelu and norm, and attention.
//
// Attention of short sequences: PyTorch's runs two batched products, a softmax and the copies round
// them, each over memory; here keys and values of one head are packed once, and scores of a few
// queries stay in the first-level cache from the first product to the last. T tokens, d head_dim.

#include "instruction_sets.h"

#if DMKD_X86

// GCC 12 warns about its own _mm512_undefined (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "scalar_types.h"
#include "transformer_avx512.h"

#define DMKD_AVX512                                                \
  __attribute__((                                                  \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2," \
             "fma,prefer-vector-width=512")))

namespace dmkd::avx512 {
namespace {

DMKD_AVX512 DMKD_INLINE __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

DMKD_AVX512 DMKD_INLINE __m512 load(const float* source, __mmask16 mask) {
  check_read(source, __builtin_popcount(mask));
  return _mm512_maskz_loadu_ps(mask, source);
}

DMKD_AVX512 DMKD_INLINE __m512 load(const BFloat16* source, __mmask16 mask) {
  check_read(source, __builtin_popcount(mask));
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

DMKD_AVX512 DMKD_INLINE void store(float* target, __mmask16 mask, __m512 value) {
  check_write(target, __builtin_popcount(mask));
  _mm512_mask_storeu_ps(target, mask, value);
}

DMKD_AVX512 DMKD_INLINE __m256i rounded(__m512 value) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
}

DMKD_AVX512 DMKD_INLINE void store(BFloat16* target, __mmask16 mask, __m256i bits) {
  check_write(target, __builtin_popcount(mask));
  _mm256_mask_storeu_epi16(target, mask, bits);
}

DMKD_AVX512 DMKD_INLINE void store(BFloat16* target, __mmask16 mask, __m512 value) {
  store(target, mask, rounded(value));
}

// 2^x for finite x <= 200 or so; 0 far below, infinity far above. 13 or 27 bits.
template <typename scalar_t>
DMKD_AVX512 DMKD_INLINE __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 8);
  const __m512 f = _mm512_sub_ps(x, n);
  if constexpr (sizeof(scalar_t) == 2) {
    __m512 poly = _mm512_set1_ps(0x1.c3f758p-5f);
    poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0x1.f0de1ap-3f));
    poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0x1.62f31ap-1f));
    poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0x1.fff692p-1f));
    return _mm512_scalef_ps(poly, n);
  } else {
    __m512 poly = _mm512_set1_ps(0x1.5bba18p-10f);
    for (const float c : {0x1.3cea84p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f}) {
      poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(c));
    }
    return _mm512_scalef_ps(poly, n);
  }
}

constexpr float kLog2E = 1.44269504f;

}  // namespace

DMKD_AVX512 void gelu(const void* in, const void* bias, void* out, int64_t begin, int64_t end,
                      int64_t columns) {
  const __m512 linear = _mm512_set1_ps(-kGeluLinear * kLog2E);
  const __m512 cubic = _mm512_set1_ps(-kGeluCubic * kLog2E);
  const __m512 high = _mm512_set1_ps(200.0f), low = _mm512_set1_ps(-200.0f);
  const __m512 one = _mm512_set1_ps(1.0f);
  const auto* addend = static_cast<const BFloat16*>(bias);
  for (int64_t r = begin; r < end; ++r) {
    const auto* source = static_cast<const BFloat16*>(in) + r * columns;
    auto* target = static_cast<BFloat16*>(out) + r * columns;
    for (int64_t i = 0; i < columns; i += 16) {
      const __mmask16 mask = first(columns - i);
      const __m512 y = _mm512_add_ps(load(source + i, mask), load(addend + i, mask));
      const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(y, y), cubic, linear);
      // In this order a NaN passes both bounds.
      const __m512 z = _mm512_max_ps(low, _mm512_min_ps(high, _mm512_mul_ps(y, inner)));
      const __m512 share = _mm512_rcp14_ps(_mm512_add_ps(one, exp2<BFloat16>(z)));
      store(target + i, mask, _mm512_mul_ps(y, share));
    }
  }
}

DMKD_AVX512 void residual_norm(const ResidualNorm& w, int64_t begin, int64_t end) {
  const int64_t n = w.columns;
  thread_local std::vector<float> scratch;
  scratch.resize(n + 16);
  float* row = scratch.data();
  const auto at = [](const void* base, int64_t offset) {
    return static_cast<const BFloat16*>(base) + offset;
  };
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / w.tokens;
    const BFloat16* x = at(w.x, r * n);
    const BFloat16* branch = at(w.branch, r * n);
    const BFloat16* bias = at(w.bias, 0);
    const BFloat16* gate = at(w.gate, image * w.gate_stride);
    const BFloat16* shift = at(w.shift, image * w.shift_stride);
    const BFloat16* scale = at(w.scale, image * w.scale_stride);
    BFloat16* x_out = static_cast<BFloat16*>(w.x_out) + r * n;
    BFloat16* normed = static_cast<BFloat16*>(w.normed) + r * n;
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      __m512 value = load(x + i, mask);
      if (w.branch != nullptr) {
        __m512 added = load(branch + i, mask);
        if (w.bias != nullptr) added = _mm512_add_ps(added, load(bias + i, mask));
        const __m256i bits = rounded(_mm512_fmadd_ps(load(gate + i, mask), added, value));
        store(x_out + i, mask, bits);
        // Rounded, as the next block will see it.
        value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      }
      _mm512_storeu_ps(row + i, value);
      sums = _mm512_add_ps(sums, value);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums) / n);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 off = _mm512_maskz_sub_ps(first(n - i), _mm512_loadu_ps(row + i), mean);
      _mm512_storeu_ps(row + i, off);
      squares = _mm512_fmadd_ps(off, off, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / n;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + w.eps));
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(row + i), inverse);
      const __m512 scaled = _mm512_fmadd_ps(value, load(scale + i, mask), value);
      store(normed + i, mask, _mm512_add_ps(scaled, load(shift + i, mask)));
    }
  }
}

namespace {

// A word is what one lane multiplies at a time: a float, or two bfloat16 next to each other.
DMKD_AVX512 DMKD_INLINE __m512 multiply_add_words(__m512 sum, uint32_t a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(a)), _mm512_castsi512_ps(b), sum);
}

DMKD_AVX512 DMKD_INLINE __m512 multiply_add_words(__m512 sum, uint32_t a, __m512i b, BFloat16) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(a)),
                          reinterpret_cast<__m512bh>(b));
}

// R rows of a (words, `a_stride` apart) times 16 * V columns of b (`b_stride` apart).
template <typename scalar_t, int R, int V, typename Finish>
DMKD_AVX512 DMKD_INLINE void product(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                     int64_t b_stride, int64_t words, const Finish& finish) {
  __m512 sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < words; ++k) {
    __m512i columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = _mm512_loadu_si512(b + k * b_stride + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[r][v] = multiply_add_words(sums[r][v], a[r * a_stride + k], columns[v], scalar_t{});
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) finish(r, v, sums[r][v]);
  }
}

// The same for any number of vectors, four at a time.
template <typename scalar_t, int R, typename Finish>
DMKD_AVX512 DMKD_INLINE void products(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                      int64_t b_stride, int64_t words, int64_t vectors,
                                      const Finish& finish) {
  int64_t done = 0;
  const auto shifted = [&](int r, int v, __m512 sum) DMKD_AVX512 { finish(r, done + v, sum); };
  for (; done + 4 <= vectors; done += 4) {
    product<scalar_t, R, 4>(a, a_stride, b + 16 * done, b_stride, words, shifted);
  }
  switch (vectors - done) {
    case 3:
      return product<scalar_t, R, 3>(a, a_stride, b + 16 * done, b_stride, words, shifted);
    case 2:
      return product<scalar_t, R, 2>(a, a_stride, b + 16 * done, b_stride, words, shifted);
    case 1:
      return product<scalar_t, R, 1>(a, a_stride, b + 16 * done, b_stride, words, shifted);
  }
}

// One head of one image, packed.
template <typename scalar_t>
struct Head {
  static constexpr int kPerWord = 4 / sizeof(scalar_t);
  static constexpr int kRows = 6;  // 24 sums, 4 columns and room for what is broadcast

  const Attention& work;
  const int64_t key_vectors, padded, key_words, value_words, value_vectors;
  std::vector<uint32_t> queries, keys, key, values, weights;
  std::vector<float> scores;

  explicit Head(const Attention& attention)
      : work(attention),
        key_vectors((attention.tokens + 15) / 16),
        padded(16 * key_vectors),
        key_words(attention.head_dim / kPerWord),
        value_words((attention.tokens + kPerWord - 1) / kPerWord),
        value_vectors((attention.head_dim + 15) / 16),
        queries(attention.tokens * key_words),
        keys(key_words * padded),
        key(key_words),
        values(value_words * 16 * value_vectors),
        weights(kRows * padded / kPerWord),
        scores(kRows * padded) {}

  const scalar_t* part(int64_t image, int64_t head, int which, int64_t token) const {
    const int64_t row = (image * work.tokens + token) * 3 + which;
    return static_cast<const scalar_t*>(work.qkv) + (row * work.heads + head) * work.head_dim;
  }

  const scalar_t* bias_of(int64_t head, int which) const {
    if (work.bias == nullptr) return nullptr;
    return static_cast<const scalar_t*>(work.bias) + (which * work.heads + head) * work.head_dim;
  }

  // Row `token` of queries or keys with its bias, rounded again.
  DMKD_AVX512 DMKD_INLINE void biased(int64_t image, int64_t head, int which, int64_t token,
                                      scalar_t* row) const {
    const scalar_t* source = part(image, head, which, token);
    const scalar_t* bias = bias_of(head, which);
    for (int64_t j = 0; j < work.head_dim; j += 16) {
      const __mmask16 mask = first(work.head_dim - j);
      __m512 value = load(source + j, mask);
      if (bias != nullptr) value = _mm512_add_ps(value, load(bias + j, mask));
      store(row + j, mask, value);
    }
  }

  // keys: word k of all tokens next to each other. values: a word holds one column of kPerWord
  // tokens. What lies beyond the last token or column is zero.
  DMKD_AVX512 void pack(int64_t image, int64_t head) {
    const int64_t d = work.head_dim;
    for (int64_t t = 0; t < work.tokens; ++t) {
      biased(image, head, 0, t, reinterpret_cast<scalar_t*>(queries.data() + t * key_words));
      biased(image, head, 1, t, reinterpret_cast<scalar_t*>(key.data()));
      for (int64_t k = 0; k < key_words; ++k) keys[k * padded + t] = key[k];
    }
    for (int64_t word = 0; word < value_words; ++word) {
      const int64_t t = word * kPerWord;
      for (int64_t j = 0; j < d; j += 16) {
        const __mmask16 mask = first(d - j);
        __m512i bits = _mm512_castps_si512(load(part(image, head, 2, t) + j, mask));
        if constexpr (kPerWord == 2) {  // the first token in the low half
          bits = _mm512_srli_epi32(bits, 16);
          if (t + 1 < work.tokens) {
            bits = _mm512_or_si512(
                bits, _mm512_castps_si512(load(part(image, head, 2, t + 1) + j, mask)));
          }
        }
        _mm512_storeu_si512(values.data() + word * 16 * value_vectors + j, bits);
      }
    }
  }

  // Weights of R queries, unnormalised, in the compute dtype; 1 / their sum in `inverse`.
  template <int R>
  DMKD_AVX512 DMKD_INLINE void softmax(float* inverse) {
    const __m512 scale = _mm512_set1_ps(kLog2E / std::sqrt(static_cast<float>(work.head_dim)));
    const __m512 lowest = _mm512_set1_ps(-1e30f);  // finite: 2^(-1e30 - x) is 0, not NaN
    const __mmask16 last = first(work.tokens - 16 * (key_vectors - 1));
    for (int r = 0; r < R; ++r) {
      float* row = scores.data() + r * padded;
      float* tail = row + 16 * (key_vectors - 1);
      _mm512_storeu_ps(tail, _mm512_mask_blend_ps(last, lowest, _mm512_loadu_ps(tail)));
      __m512 most = lowest;
      for (int64_t i = 0; i < padded; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + i));
      const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
      auto* target = reinterpret_cast<scalar_t*>(weights.data() + r * padded / kPerWord);
      __m512 sums = _mm512_setzero_ps();
      for (int64_t i = 0; i < padded; i += 16) {
        // Exactly 0 for the largest: a fused x * scale - top * scale is off by the rounding of top.
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), top), scale);
        const __m512 weight = exp2<scalar_t>(x);
        sums = _mm512_add_ps(sums, weight);
        store(target + i, 0xffff, weight);
      }
      inverse[r] = 1.0f / _mm512_reduce_add_ps(sums);
    }
  }

  template <int R>
  DMKD_AVX512 void queries_from(int64_t image, int64_t head, int64_t token) {
    products<scalar_t, R>(queries.data() + token * key_words, key_words, keys.data(), padded,
                          key_words, key_vectors, [&](int r, int64_t v, __m512 sum) DMKD_AVX512 {
                            _mm512_storeu_ps(scores.data() + r * padded + 16 * v, sum);
                          });
    float inverse[R];
    softmax<R>(inverse);
    const int64_t d = work.head_dim;
    const scalar_t* bias = bias_of(head, 2);
    auto* out = static_cast<scalar_t*>(work.out);
    products<scalar_t, R>(
        weights.data(), padded / kPerWord, values.data(), 16 * value_vectors, value_words,
        value_vectors, [&](int r, int64_t v, __m512 sum) DMKD_AVX512 {
          const __mmask16 mask = first(d - 16 * v);
          __m512 value = _mm512_mul_ps(sum, _mm512_set1_ps(inverse[r]));
          // The weights of a query sum to one, so the bias of the values may be added here.
          if (bias != nullptr) value = _mm512_add_ps(value, load(bias + 16 * v, mask));
          const int64_t row = (image * work.tokens + token + r) * work.heads + head;
          store(out + row * d + 16 * v, mask, value);
        });
  }

  DMKD_AVX512 void run(int64_t image, int64_t head) {
    pack(image, head);
    const int64_t blocks = (work.tokens + kRows - 1) / kRows;
    int64_t token = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t rows = (work.tokens - token) / (blocks - block);  // as equal as can be
      switch (rows) {
        case 6:
          queries_from<6>(image, head, token);
          break;
        case 5:
          queries_from<5>(image, head, token);
          break;
        case 4:
          queries_from<4>(image, head, token);
          break;
        case 3:
          queries_from<3>(image, head, token);
          break;
        case 2:
          queries_from<2>(image, head, token);
          break;
        case 1:
          queries_from<1>(image, head, token);
          break;
      }
      token += rows;
    }
  }
};

template <typename scalar_t>
void run(const Attention& work, int64_t begin, int64_t end) {
  Head<scalar_t> head(work);
  for (int64_t i = begin; i < end; ++i) head.run(i / work.heads, i % work.heads);
}

}  // namespace

void attention_bfloat16(const Attention& work, int64_t begin, int64_t end) {
  run<BFloat16>(work, begin, end);
}

void attention_float(const Attention& work, int64_t begin, int64_t end) {
  run<float>(work, begin, end);
}

}  // namespace dmkd::avx512

#endif
