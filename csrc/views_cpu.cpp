// Gather, crop, resize (bilinear, antialiased), flip, normalise, cast: planar bytes in, dense
// channels-last out, in one pass.
//
// A crop of the view's size is a table lookup. Any other is resampled by rows: each source row is
// widened and normalised, resampled and interleaved once, into a ring of as many rows as the
// vertical filter has taps (a few KiB, in L1); an output row is a weighted sum of those. Weights
// are ratios of integers, so positions are exact. A view depends on nothing but its own row and
// is computed in a fixed order: the number of threads changes no bit.
// B rows, c channels, H W pixels of a slot, S side of a view. Definition:
// dmkd_fast/views/reference.py.

#include "views_cpu.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "instruction_sets.h"
#include "scalar_types.h"
#include "views_resample.h"

namespace dmkd {
namespace {

struct Scratch {
  Axis rows, columns;
  std::vector<float> lines;  // (c, crop's width + slack): one source row
  std::vector<float> ring;   // (taps, S * c + slack): resampled rows
  std::vector<const float*> sources;
  std::vector<std::byte> table;  // (c, 256) of the view's dtype
};

Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

struct Box {
  int64_t top, left, height, width;
  bool flip;
  const uint8_t* slot;

  Box(const ViewsArguments& a, int64_t row)
      : top(a.boxes[4 * row]),
        left(a.boxes[4 * row + 1]),
        height(a.boxes[4 * row + 2]),
        width(a.boxes[4 * row + 3]),
        flip(a.flips[row] != 0),
        slot(a.slots + a.indices[row] * a.slot_stride) {}
};

// What a crop's row reads of an image's row: [begin, end) in the crop's own columns; the rest is
// black. Empty for rows above and below the image.
struct Span {
  int64_t begin, end;

  Span(const ViewsArguments& a, const Box& box, int64_t y) {
    const bool is_black = y < 0 || y >= a.height;
    begin = is_black ? 0 : std::clamp<int64_t>(-box.left, 0, box.width);
    end = is_black ? 0 : std::clamp<int64_t>(a.width - box.left, begin, box.width);
  }
};

// Values of all bytes in all channels: the definition's own operations, rounded one by one.
template <typename scalar_t>
DMKD_INLINE const scalar_t* fill_table(const ViewsArguments& a, Scratch& s) {
  s.table.resize(a.channels * 256 * sizeof(scalar_t));
  auto* const table = reinterpret_cast<scalar_t*>(s.table.data());
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int pixel = 0; pixel < 256; ++pixel) {
      narrow(table + 256 * c + pixel, (static_cast<float>(pixel) / 255.0f - a.mean[c]) / a.std[c]);
    }
  }
  return table;
}

// A crop of the view's size. static_channels: c where it is 1 or 3, else 0.
template <int static_channels, typename scalar_t>
DMKD_INLINE void copy_crop(const ViewsArguments& a, const Box& box, const scalar_t* table,
                           scalar_t* out) {
  const int64_t channels = static_channels != 0 ? static_channels : a.channels;
  const int64_t plane = a.height * a.width, step = box.flip ? -channels : channels;
  for (int64_t i = 0; i < a.size; ++i) {
    const int64_t y = box.top + i;
    const Span span(a, box, y);
    const int64_t line = y * a.width + box.left;  // where the crop's row would begin
    scalar_t* target = out + (i * a.size + (box.flip ? a.size - 1 : 0)) * channels;
    for (int64_t j = 0; j < a.size; ++j, target += step) {
      const bool is_black = j < span.begin || j >= span.end;
      for (int64_t c = 0; c < channels; ++c) {
        target[c] = table[256 * c + (is_black ? 0 : box.slot[line + c * plane + j])];
      }
    }
  }
}

template <Isa isa, typename scalar_t>
struct Resampler {
  static constexpr bool has_fma = isa != Isa::kBaseline || kBaselineHasFma;
  const ViewsArguments& a;
  Scratch& s;
  const Box& box;
  const int64_t line_stride, ring_stride;

  DMKD_INLINE void run(scalar_t* out) {
    s.rows.set(box.height, a.size, false);
    s.columns.set(box.width, a.size, box.flip);
    s.lines.assign(a.channels * line_stride, 0.0f);
    s.ring.resize(s.rows.taps * ring_stride);
    s.sources.resize(s.rows.taps);
    const int64_t count = a.size * a.channels;
    int64_t next = 0;  // first row of the crop that is not in the ring yet
    for (int64_t i = 0; i < a.size; ++i) {
      const int64_t begin = s.rows.first[i];
      const int64_t last = std::min(begin + s.rows.taps, box.height) - 1;
      for (next = std::max(next, begin); next <= last; ++next) fill(next);
      for (int64_t k = 0; k < s.rows.taps; ++k) s.sources[k] = slot(std::min(begin + k, last));
      const float* weights = s.rows.weights.data() + i;
#if DMKD_X86
      if constexpr (isa == Isa::kAvx512) {
        blend_avx512(s.sources.data(), weights, a.size, s.rows.taps, out + i * count, count);
        continue;
      }
#endif
      blend<has_fma>(s.sources.data(), weights, a.size, s.rows.taps, out + i * count, count);
    }
  }

  DMKD_INLINE float* slot(int64_t row) { return s.ring.data() + row % s.rows.taps * ring_stride; }

  // Row `row` of the crop, widened, normalised, resampled to S pixels and interleaved.
  DMKD_INLINE void fill(int64_t row) {
    const int64_t y = box.top + row;
    const Span span(a, box, y);
    for (int64_t c = 0; c < a.channels; ++c) {
      const float scale = 1.0f / (255.0f * a.std[c]), shift = -a.mean[c] / a.std[c];
      float* const line = s.lines.data() + c * line_stride;
      std::fill(line, line + span.begin, shift);
      std::fill(line + span.end, line + box.width, shift);
      if (span.end > span.begin) {
        const int64_t pixel = (c * a.height + y) * a.width + box.left + span.begin;
        widen_line<has_fma>(box.slot + pixel, line + span.begin, span.end - span.begin, scale,
                            shift);
      }
    }
    float* const target = slot(row);
#if DMKD_X86
    if constexpr (isa == Isa::kAvx512) {
      if (a.channels == 3) {
        resample_lines_avx512<3>(s.columns, s.lines.data(), line_stride, target, a.size);
        return;
      }
      if (a.channels == 1) {
        resample_lines_avx512<1>(s.columns, s.lines.data(), line_stride, target, a.size);
        return;
      }
    }
#endif
    for (int64_t c = 0; c < a.channels; ++c) {
      resample_line<has_fma>(s.columns, s.lines.data() + c * line_stride, target + c, a.size,
                             a.channels);
    }
  }
};

template <Isa isa, typename scalar_t>
DMKD_INLINE void render(const ViewsArguments& a, int64_t begin, int64_t end) {
  Scratch& s = scratch();
  const scalar_t* table = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const Box box(a, row);
    scalar_t* const out = static_cast<scalar_t*>(a.out) + row * a.size * a.size * a.channels;
    if (box.height != a.size || box.width != a.size) {
      Resampler<isa, scalar_t>{a, s, box, (box.width + kSlack) / 16 * 16,
                               (a.size * a.channels + kSlack) / 16 * 16}
          .run(out);
      continue;
    }
    if (table == nullptr) table = fill_table<scalar_t>(a, s);
    if (a.channels == 1) {
      copy_crop<1>(a, box, table, out);
    } else if (a.channels == 3) {
      copy_crop<3>(a, box, table, out);
    } else {
      copy_crop<0>(a, box, table, out);
    }
  }
}

template <Isa isa>
DMKD_INLINE void render_any(const ViewsArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case ViewDtype::kFloat:
      return render<isa, float>(a, begin, end);
    case ViewDtype::kHalf:
      return render<isa, Half>(a, begin, end);
    case ViewDtype::kBFloat16:
      return render<isa, BFloat16>(a, begin, end);
  }
}

DMKD_FLATTEN_AVX512 void rows_avx512(const ViewsArguments& a, int64_t begin, int64_t end) {
  render_any<Isa::kAvx512>(a, begin, end);
}

DMKD_FLATTEN_AVX2 void rows_avx2(const ViewsArguments& a, int64_t begin, int64_t end) {
  render_any<Isa::kAvx2>(a, begin, end);
}

void rows_baseline(const ViewsArguments& a, int64_t begin, int64_t end) {
  render_any<Isa::kBaseline>(a, begin, end);
}

}  // namespace

bool is_slot(const ViewsArguments& a, int64_t row) {
  return a.indices[row] >= 0 && a.indices[row] < a.num_slots;
}

bool is_inside(const ViewsArguments& a, int64_t row) {
  const Box box(a, row);
  return box.height > 0 && box.width > 0 && box.top >= -a.pad && box.left >= -a.pad &&
         box.top + box.height <= a.height + a.pad && box.left + box.width <= a.width + a.pad;
}

void view_rows(const ViewsArguments& arguments, int64_t begin, int64_t end) {
  static const auto run = best_of(rows_baseline, rows_avx2, rows_avx512);
  run(arguments, begin, end);
}

}  // namespace dmkd
