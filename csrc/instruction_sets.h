// Instruction sets that functions are compiled for, and the best one of this CPU.
//
// On x86-64 the same code is compiled several times and the machine decides at run time. Elsewhere
// (aarch64) all variants are the baseline of the architecture, which has vectors and fused
// multiply-adds, and the first one is used.

#pragma once

#if !defined(DMKD_X86) && defined(__x86_64__)  // tests set it to 0
#define DMKD_X86 1
#endif

#if DMKD_X86
// `flatten` pulls everything into the function that carries the target attribute.
#define DMKD_FLATTEN_FOR(...) __attribute__((flatten, target(__VA_ARGS__)))
#else
#define DMKD_FLATTEN_FOR(...) __attribute__((flatten))
#endif

#define DMKD_AVX512_TARGET \
  "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#define DMKD_FLATTEN_AVX2 DMKD_FLATTEN_FOR("avx2,fma")
#define DMKD_FLATTEN_AVX512 DMKD_FLATTEN_FOR(DMKD_AVX512_TARGET)

namespace dmkd {

#if defined(__FP_FAST_FMAF)
constexpr bool kBaselineHasFma = true;
#else
constexpr bool kBaselineHasFma = false;
#endif

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline Isa best_isa() {
#if DMKD_X86
  static const Isa best = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2
                                                                           : Isa::kBaseline;
  }();
  return best;
#else
  return Isa::kBaseline;
#endif
}

// The variant of a function for the best instruction set of this CPU.
template <typename Function>
Function* best_of(Function* baseline, Function* avx2, Function* avx512) {
  const Isa isa = best_isa();
  return isa >= Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : baseline;
}

}  // namespace dmkd
