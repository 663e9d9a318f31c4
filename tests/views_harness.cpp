// Drives csrc/views_cpu.cpp over random inputs, each instruction set by itself, against a plain
// double-precision definition. test_views_op.py builds it with address and undefined-behaviour
// sanitizers; every buffer is exactly as large as it must be, so a byte too far is noticed.
//   views_harness SEED ROUNDS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../csrc/views_cpu.cpp"

namespace {

std::mt19937_64 generator;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <typename T>
std::unique_ptr<T[]> exactly(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

double weight(int64_t pixel, int64_t place, int64_t length, int64_t size) {
  const double scale = double(length) / double(size);
  const double centre = (double(place) + 0.5) * scale, support = scale > 1.15 ? scale : 1.0;
  return std::max(0.0, 1.0 - std::abs(double(pixel) + 0.5 - centre) / support);
}

double expected(const dmkd::ViewsArguments& a, int64_t row, int64_t c, int64_t i, int64_t j) {
  const int32_t* box = a.boxes + 4 * row;
  if (a.flips[row]) j = a.size - 1 - j;
  double value = 0, total = 0;
  for (int64_t y = 0; y < box[2]; ++y) {
    const double down = weight(y, i, box[2], a.size);
    if (down == 0) continue;
    for (int64_t x = 0; x < box[3]; ++x) {
      const double share = down * weight(x, j, box[3], a.size);
      const int64_t line = box[0] + y, column = box[1] + x;
      total += share;
      if (line < 0 || line >= a.height || column < 0 || column >= a.width) continue;
      const int64_t place = (c * a.height + line) * a.width + column;
      value += share * a.slots[a.indices[row] * a.slot_stride + place];
    }
  }
  return (value / total / 255 - a.mean[c]) / a.std[c];
}

double read(const dmkd::ViewsArguments& a, const void* out, int64_t place) {
  switch (a.dtype) {
    case dmkd::ViewDtype::kFloat:
      return static_cast<const float*>(out)[place];
    case dmkd::ViewDtype::kHalf:
      return dmkd::widen<float>(static_cast<const dmkd::Half*>(out)[place]);
    default:
      return dmkd::widen<float>(static_cast<const dmkd::BFloat16*>(out)[place]);
  }
}

void round_of(int number) {
  dmkd::ViewsArguments a{};
  const int64_t widest = draw(0, 9) == 0 ? 200 : 40;
  a.height = draw(1, widest);
  a.width = draw(1, widest);
  a.channels = draw(1, 4);
  a.size = draw(1, draw(0, 3) == 0 ? 3 : widest);
  a.pad = draw(0, 5);
  a.num_slots = draw(1, 3);
  a.slot_stride = a.channels * a.height * a.width;
  a.dtype = static_cast<dmkd::ViewDtype>(draw(0, 2));
  const int64_t rows = draw(1, 3), numbers = a.size * a.size * a.channels;
  auto slots = exactly<uint8_t>(a.num_slots * a.slot_stride);
  for (int64_t i = 0; i < a.num_slots * a.slot_stride; ++i) slots[i] = uint8_t(draw(0, 255));
  auto indices = exactly<int64_t>(rows);
  auto boxes = exactly<int32_t>(4 * rows);
  auto flips = exactly<uint8_t>(rows);
  auto mean = exactly<float>(a.channels), std = exactly<float>(a.channels);
  for (int64_t c = 0; c < a.channels; ++c) {
    mean[c] = float(draw(0, 1000)) / 1000;
    std[c] = float(draw(200, 1000)) / 1000;
  }
  for (int64_t row = 0; row < rows; ++row) {
    indices[row] = draw(0, a.num_slots - 1);
    flips[row] = uint8_t(draw(0, 1));
    const bool same = draw(0, 2) == 0 && a.size <= std::min(a.height, a.width) + 2 * a.pad;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t room = (axis == 0 ? a.height : a.width) + 2 * a.pad;
      const int64_t length = same ? a.size : draw(1, room);
      boxes[4 * row + 2 + axis] = int32_t(length);
      boxes[4 * row + axis] = int32_t(draw(0, room - length) - a.pad);
    }
  }
  const int64_t bytes = a.dtype == dmkd::ViewDtype::kFloat ? 4 : 2;
  auto out = exactly<std::byte>(rows * numbers * bytes);
  a.slots = slots.get();
  a.indices = indices.get();
  a.boxes = boxes.get();
  a.flips = flips.get();
  a.mean = mean.get();
  a.std = std.get();
  a.out = out.get();
  const double rounding[] = {0, 0x1p-11, 0x1p-8};
  struct {
    const char* name;
    bool runs;
    void (*run)(const dmkd::ViewsArguments&, int64_t, int64_t);
  } const sets[] = {
      {"scalar", true, dmkd::rows_scalar},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), dmkd::rows_avx2},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       dmkd::rows_avx512}};
  for (const auto& set : sets) {
    if (!set.runs) continue;
    std::fill(out.get(), out.get() + rows * numbers * bytes, std::byte{0xff});
    for (int64_t row = 0; row < rows; ++row) {
      if (!dmkd::is_slot(a, row) || !dmkd::is_inside(a, row)) std::abort();
    }
    dmkd::scratch() = dmkd::Scratch{};  // Memory of earlier rounds would hide a read too far.
    set.run(a, 0, rows);
    for (int64_t i = 0; i < rows * numbers; i += draw(1, 7)) {
      const int64_t row = i / numbers, c = i % a.channels, pixel = i % numbers / a.channels;
      const double want = expected(a, row, c, pixel / a.size, pixel % a.size);
      const double got = read(a, a.out, i);
      const double limit = 2e-6 / double(a.std[c]) + rounding[int(a.dtype)] * std::abs(want);
      if (!(std::abs(got - want) <= limit)) {
        std::printf("%s, round %d: got %.9g, expected %.9g\n", set.name, number, got, want);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  const int rounds = std::atoi(arguments[2]);
  for (int i = 0; i < rounds; ++i) round_of(i);
  std::printf("%d rounds agree\n", rounds);
}
