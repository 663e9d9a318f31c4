// CPU implementations of the sampler's operators, by libtorch's stable ABI (see register.cpp).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "activations_cpu.h"
#include "noise_cpu.h"

namespace dmkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 32768;

int64_t grain(int64_t per_row) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, per_row));
}

bool is_bfloat16(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "expected float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

Tensor normal(int64_t seed, const Tensor& ids, int64_t step, int64_t count) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                  "ids: expected (B,) int64");
  const Tensor dense = torch::stable::contiguous(ids);
  Tensor out = torch::stable::new_empty(dense, {dense.size(0), count}, ScalarType::Float);
  const NoiseArguments arguments{static_cast<const int64_t*>(dense.const_data_ptr()),
                                 static_cast<float*>(out.mutable_data_ptr()), count,
                                 static_cast<uint64_t>(seed), static_cast<uint32_t>(step)};
  torch::stable::parallel_for(0, dense.size(0), grain(8 * count), [&](int64_t begin, int64_t end) {
    normal_rows(arguments, begin, end);
  });
  return out;
}

Tensor gelu(const Tensor& input, const Tensor& bias) {
  const Tensor dense = torch::stable::contiguous(input), addend = torch::stable::contiguous(bias);
  const bool bfloat16 = is_bfloat16(dense);
  const int64_t columns = addend.numel();
  STD_TORCH_CHECK(addend.dim() == 1 && dense.dim() > 0 && columns == dense.size(dense.dim() - 1) &&
                      addend.scalar_type() == dense.scalar_type(),
                  "bias: expected the size of the last dimension and the dtype of the input");
  Tensor out = torch::stable::empty_like(dense);
  const void* in = dense.const_data_ptr();
  const void* added = addend.const_data_ptr();
  void* target = out.mutable_data_ptr();
  const int64_t rows = columns == 0 ? 0 : dense.numel() / columns;
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    gelu_tanh(in, added, target, begin, end, columns, bfloat16);
  });
  return out;
}

Tensor scaled_softmax(const Tensor& input, double scale) {
  const Tensor dense = torch::stable::contiguous(input);
  const bool bfloat16 = is_bfloat16(dense);
  Tensor out = torch::stable::empty_like(dense);
  const int64_t columns = dense.size(dense.dim() - 1);
  const void* in = dense.const_data_ptr();
  void* target = out.mutable_data_ptr();
  const int64_t rows = columns == 0 ? 0 : dense.numel() / columns;
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    softmax_rows(in, target, begin, end, columns, static_cast<float>(scale), bfloat16);
  });
  return out;
}

}  // namespace
}  // namespace dmkd

STABLE_TORCH_LIBRARY_IMPL(dmkd_fast, CPU, m) {
  m.impl("normal", TORCH_BOX(&dmkd::normal));
  m.impl("gelu_tanh", TORCH_BOX(&dmkd::gelu));
  m.impl("scaled_softmax", TORCH_BOX(&dmkd::scaled_softmax));
}
