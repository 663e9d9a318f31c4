// CPU implementations of the operators behind views, by libtorch's stable ABI (see register.cpp).

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "view_boxes_cpu.h"
#include "views_cpu.h"

namespace dmkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 16384;
constexpr int64_t kMaxSide = 8192;  // MAX_SIDE of dmkd_fast/views/ops.py
// Results above this size are mapped again by glibc each time, and every page of them faults.
constexpr int64_t kMappedBytes = int64_t{32} << 20;
#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)  // Linux 5.14
#define MADV_POPULATE_WRITE 23
#endif

// Maps the pages under a stretch of fresh memory in one call, shortly before it is written. Two
// threads fill 77 MB in 13 to 15 ms so, in 22 fault by fault. Asking for 2 MiB pages instead is
// faster at best (5 ms), but took 76 ms where the kernel had to make room for them first.
void populate([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = start / page * page;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
}

// The stride of a dimension of one element means nothing.
bool has_stride(const Tensor& tensor, int64_t dim, int64_t stride) {
  return tensor.size(dim) == 1 || tensor.stride(dim) == stride;
}

void check_vector(const Tensor& tensor, int64_t size, ScalarType dtype, const char* expected) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype,
                  expected);
}

ViewDtype dtype_of(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return ViewDtype::kFloat;
    case ScalarType::Half:
      return ViewDtype::kHalf;
    case ScalarType::BFloat16:
      return ViewDtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype: expected float32, float16 or bfloat16");
  }
}

void fill(const Tensor& out, const Tensor& slots, const Tensor& indices, const Tensor& boxes,
          const Tensor& flips, const Tensor& mean, const Tensor& std, int64_t pad, bool is_fresh) {
  STD_TORCH_CHECK(slots.dim() == 4 && slots.scalar_type() == ScalarType::Byte,
                  "slots: expected (N, c, H, W) uint8");
  const int64_t channels = slots.size(1), height = slots.size(2), width = slots.size(3);
  STD_TORCH_CHECK(slots.numel() == 0 || (has_stride(slots, 3, 1) && has_stride(slots, 2, width) &&
                                         has_stride(slots, 1, height * width)),
                  "slots: expected dense images");
  STD_TORCH_CHECK(channels > 0 && 0 <= pad && pad <= kMaxSide,
                  "slots, pad: expected channels and a border of 0 to ", kMaxSide);
  const int64_t rows = indices.dim() == 1 ? indices.size(0) : -1;
  check_vector(indices, rows, ScalarType::Long, "indices: expected (B,) int64");
  check_vector(flips, rows, ScalarType::Bool, "flips: expected (B,) bool");
  check_vector(mean, channels, ScalarType::Float, "mean: expected (c,) float32");
  check_vector(std, channels, ScalarType::Float, "std: expected (c,) float32");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == rows && boxes.size(1) == 4 &&
                      boxes.scalar_type() == ScalarType::Int,
                  "boxes: expected (B, 4) int32");
  const int64_t size = out.dim() == 4 ? out.size(3) : 0;
  STD_TORCH_CHECK(size > 0 && out.size(0) == rows && out.size(1) == channels && out.size(2) == size,
                  "out: expected (B, c, S, S)");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(has_stride(out, 1, 1) && has_stride(out, 3, channels) &&
                      has_stride(out, 2, size * channels) &&
                      has_stride(out, 0, size * size * channels),
                  "out: expected channels_last");
  const Tensor held[] = {torch::stable::contiguous(indices), torch::stable::contiguous(boxes),
                         torch::stable::contiguous(flips), torch::stable::contiguous(mean),
                         torch::stable::contiguous(std)};
  const ViewsArguments a{static_cast<const uint8_t*>(slots.const_data_ptr()),
                         slots.stride(0),
                         slots.size(0),
                         channels,
                         height,
                         width,
                         static_cast<const int64_t*>(held[0].const_data_ptr()),
                         static_cast<const int32_t*>(held[1].const_data_ptr()),
                         static_cast<const uint8_t*>(held[2].const_data_ptr()),
                         static_cast<const float*>(held[3].const_data_ptr()),
                         static_cast<const float*>(held[4].const_data_ptr()),
                         out.mutable_data_ptr(),
                         dtype_of(out),
                         size,
                         pad};
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(is_slot(a, row), "indices: got ", a.indices[row], " in row ", row,
                    ", expected 0 to ", a.num_slots - 1);
    const int32_t* box = a.boxes + 4 * row;
    STD_TORCH_CHECK(is_inside(a, row), "boxes: got top ", box[0], ", left ", box[1], ", height ",
                    box[2], ", width ", box[3], " in row ", row, ", expected it to lie in the ",
                    height, " x ", width, " image and its border of ", pad);
  }
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (size * size * channels));
  const int64_t bytes = size * size * channels * static_cast<int64_t>(out.element_size());
  const bool faults = is_fresh && rows * bytes > kMappedBytes;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    if (!faults) return view_rows(a, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      populate(static_cast<char*>(a.out) + row * bytes, bytes);
      view_rows(a, row, row + 1);
    }
  });
}

Tensor views(const Tensor& slots, const Tensor& indices, const Tensor& boxes, const Tensor& flips,
             const Tensor& mean, const Tensor& std, int64_t size, int64_t pad, ScalarType dtype) {
  STD_TORCH_CHECK(slots.dim() == 4 && indices.dim() == 1, "slots: expected (N, c, H, W) uint8");
  const Tensor out = torch::stable::empty({indices.size(0), slots.size(1), size, size}, dtype,
                                          std::nullopt, std::nullopt, std::nullopt,
                                          torch::headeronly::MemoryFormat::ChannelsLast);
  fill(out, slots, indices, boxes, flips, mean, std, pad, true);
  return out;
}

void views_out(const Tensor& out, const Tensor& slots, const Tensor& indices, const Tensor& boxes,
               const Tensor& flips, const Tensor& mean, const Tensor& std, int64_t pad) {
  fill(out, slots, indices, boxes, flips, mean, std, pad, false);
}

std::tuple<Tensor, Tensor> view_boxes(int64_t seed, const Tensor& ids, const Tensor& uses,
                                      int64_t height, int64_t width, int64_t pad, int64_t area_low,
                                      int64_t area_high, int64_t shape_low, int64_t shape_high,
                                      int64_t spare_height, int64_t spare_width, int64_t tries,
                                      double flip) {
  const int64_t rows = ids.dim() == 1 ? ids.size(0) : -1;
  check_vector(ids, rows, ScalarType::Long, "ids: expected (B,) int64");
  check_vector(uses, rows, ScalarType::Long, "uses: expected (B,) int64");
  // Sides and areas whose products fit into 64 bits, and boxes into 32.
  const auto within = [](int64_t value, int64_t low, int64_t high) {
    return low <= value && value <= high;
  };
  constexpr int64_t kWhole = int64_t{1} << 24;
  STD_TORCH_CHECK(within(height, 1, kMaxSide) && within(width, 1, kMaxSide) &&
                      within(pad, 0, kMaxSide) && within(spare_height, 1, height) &&
                      within(spare_width, 1, width) && within(area_low, 0, area_high) &&
                      area_high <= kWhole && within(shape_low, -8 * kWhole, shape_high) &&
                      shape_high < 8 * kWhole && within(tries, 0, 10),
                  "view_boxes: got an argument out of range");
  const BoxRecipe recipe{height,
                         width,
                         pad,
                         area_low,
                         area_high,
                         shape_low,
                         shape_high,
                         spare_height,
                         spare_width,
                         tries,
                         static_cast<float>(flip)};
  const Tensor dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_uses = torch::stable::contiguous(uses);
  const Tensor boxes = torch::stable::new_empty(ids, {rows, 4}, ScalarType::Int);
  const Tensor flips = torch::stable::new_empty(ids, {rows}, ScalarType::Bool);
  const auto* id = static_cast<const int64_t*>(dense_ids.const_data_ptr());
  const auto* use = static_cast<const int64_t*>(dense_uses.const_data_ptr());
  auto* box = static_cast<int32_t*>(boxes.mutable_data_ptr());
  auto* flipped = static_cast<bool*>(flips.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    // The counter has 24 bits for the use: larger ones would repeat earlier views.
    STD_TORCH_CHECK(use[row] >> 24 == 0, "uses: expected 0 to 2**24 - 1");
    view_box(recipe, static_cast<uint64_t>(seed), static_cast<uint64_t>(id[row]),
             static_cast<uint32_t>(use[row]), box + 4 * row, flipped + row);
  }
  return {boxes, flips};
}

}  // namespace
}  // namespace dmkd

STABLE_TORCH_LIBRARY_IMPL(dmkd_fast, CPU, m) {
  m.impl("views", TORCH_BOX(&dmkd::views));
  m.impl("views_out", TORCH_BOX(&dmkd::views_out));
  m.impl("view_boxes", TORCH_BOX(&dmkd::view_boxes));
}
