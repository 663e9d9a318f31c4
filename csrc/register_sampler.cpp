// CPU implementations of the sampler's operators, by libtorch's stable ABI (see register.cpp).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "noise_cpu.h"
#include "transformer_cpu.h"

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

// One row per image, however far apart.
int64_t rows_of_images(const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(2) &&
                      (tensor.size(1) <= 1 || tensor.stride(1) == 1) &&
                      tensor.scalar_type() == x.scalar_type(),
                  "gate, shift, scale: expected (images, columns) with dense rows, the dtype of x");
  return tensor.stride(0);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> norm(const Tensor& x, const std::optional<Tensor>& branch,
                                const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& gate, const Tensor& shift,
                                const Tensor& scale, double eps) {
  const bool bfloat16 = is_bfloat16(x);
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(),
                  "x: expected (images, tokens, columns), contiguous");
  STD_TORCH_CHECK(branch.has_value() == gate.has_value(), "branch and gate: expected both or none");
  const int64_t rows = x.size(0) * x.size(1), columns = x.size(2);
  if (branch.has_value()) {
    STD_TORCH_CHECK(branch->is_contiguous() && branch->dim() == 3 && branch->size(0) == x.size(0) &&
                        branch->size(1) == x.size(1) && branch->size(2) == columns &&
                        branch->scalar_type() == x.scalar_type(),
                    "branch: expected the shape and dtype of x, contiguous");
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->is_contiguous() && bias->numel() == columns && bias->scalar_type() == x.scalar_type(),
        "bias: expected one number per column, the dtype of x");
  }
  Tensor normed = torch::stable::empty_like(x);
  // Without a branch the sum is x itself; an operator may not return its argument.
  Tensor sum = branch.has_value() ? torch::stable::empty_like(x)
                                  : torch::stable::new_empty(x, {0}, x.scalar_type());
  const ResidualNorm work{x.const_data_ptr(),
                          data_of(branch),
                          data_of(bias),
                          data_of(gate),
                          shift.const_data_ptr(),
                          scale.const_data_ptr(),
                          sum.mutable_data_ptr(),
                          normed.mutable_data_ptr(),
                          columns,
                          x.size(1),
                          gate.has_value() ? rows_of_images(*gate, x) : 0,
                          rows_of_images(shift, x),
                          rows_of_images(scale, x),
                          static_cast<float>(eps)};
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    residual_norm(work, begin, end, bfloat16);
  });
  return {sum, normed};
}

Tensor attend(const Tensor& qkv, const std::optional<Tensor>& bias) {
  const bool bfloat16 = is_bfloat16(qkv);
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.is_contiguous(),
                  "qkv: expected (images, tokens, 3, heads, head_dim), contiguous");
  const int64_t images = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), d = qkv.size(4);
  STD_TORCH_CHECK(d % 2 == 0 && can_attend(bfloat16),
                  "attention: expected an even head_dim and a CPU with AVX-512 (AVX512-BF16 for "
                  "bfloat16); set attention=auto");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == 3 * heads * d &&
                        bias->scalar_type() == qkv.scalar_type(),
                    "bias: expected 3 * heads * head_dim numbers, the dtype of qkv");
  }
  Tensor out = torch::stable::new_empty(qkv, {images, tokens, heads, d}, qkv.scalar_type());
  const Attention work{
      qkv.const_data_ptr(), data_of(bias), out.mutable_data_ptr(), tokens, heads, d};
  torch::stable::parallel_for(
      0, images * heads, grain(tokens * (tokens + d)),
      [&](int64_t begin, int64_t end) { attention(work, begin, end, bfloat16); });
  return out;
}

}  // namespace
}  // namespace dmkd

STABLE_TORCH_LIBRARY_IMPL(dmkd_fast, CPU, m) {
  m.impl("normal", TORCH_BOX(&dmkd::normal));
  m.impl("gelu_tanh", TORCH_BOX(&dmkd::gelu));
  m.impl("residual_norm", TORCH_BOX(&dmkd::norm));
  // Elsewhere its definition in Python runs.
  if (dmkd::can_attend(false)) m.impl("short_attention", TORCH_BOX(&dmkd::attend));
}
