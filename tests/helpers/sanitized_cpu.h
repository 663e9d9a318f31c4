// Included before each source of a sanitized build: DMKD_INSTRUCTION_SET limits what the CPU is
// taken to support, so that one machine runs the code of older ones.

#pragma once

#include <cstdlib>
#include <string_view>

inline bool is_allowed(std::string_view feature) {
  const char* variable = std::getenv("DMKD_INSTRUCTION_SET");
  const std::string_view limit = variable == nullptr ? "avx512_bf16" : variable;
  if (limit == "scalar") return false;
  if (limit == "avx2") return feature.substr(0, 6) != "avx512";
  return limit == "avx512_bf16" || feature != "avx512bf16";
}

#define __builtin_cpu_supports(feature) (is_allowed(feature) && __builtin_cpu_supports(feature))
