// The kernels of masked_fill against a loop.
#include "cuda/masked_fill_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

struct Element16 {
  std::uint64_t words[2];
  bool operator==(const Element16&) const = default;
};

template <class T>
T from_bits(std::uint64_t bits) {
  T value{};
  std::memcpy(&value, &bits, std::min(sizeof(value), sizeof(bits)));
  return value;
}

// Of `lines` lines; with a length of 1 elements of a transposed matrix.
template <class T>
void check(std::int64_t lines, std::int64_t length, bool in_place, bool shared_mask, bool on_device) {
  SCOPED_TRACE(std::to_string(lines) + " lines of " + std::to_string(length) + (in_place ? " in place" : "") +
               (shared_mask ? " with a mask a line" : "") + ", bytes " + std::to_string(sizeof(T)));
  std::mt19937_64 random(lines * 1000 + length);
  const std::int64_t n = lines * length, columns = length > 1 ? length : 7;
  // Lines do not begin at multiples of 16 bytes, and not at the same ones in `in` and in `out`.
  Buffer<T> out(n, 1), in(n, in_place ? 1 : random() % 4), expected(n);
  Buffer<unsigned char> mask(shared_mask ? lines : n, random() % 3);
  Buffer<T> value(1);
  value[0] = from_bits<T>(0x0123456789abcdef);
  for (T& x : in) x = from_bits<T>(random());
  for (auto& m : mask) m = mask_byte(random() % 3 == 0, random);
  MaskedFillWork work{};
  if (length > 1) {
    work.lines = make_rows<3>({lines}, {{length}, {length}, {shared_mask ? 1 : length}});
  } else {
    work.lines = make_rows<3>({columns, lines / columns}, {{1, columns}, {1, columns}, {1, columns}});
  }
  work.length = length;
  work.shared_mask = shared_mask;
  work.element_bytes = sizeof(T);
  work.out = out.data();
  work.in = in_place ? nullptr : in.data();
  work.mask = mask.data();
  std::memcpy(work.value, &value[0], sizeof(T));
  if (on_device) work.device_value = value.data(), work.value[0] = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    expected[i] = mask[shared_mask ? i / length : i] != 0 ? value[0] : in[i];
  }
  with_schedules(1, [&] {
    std::copy_n(in.data(), n, out.data());
    if (!in_place) std::fill_n(out.data(), n, T{});
    masked_fill(work, 1, nullptr);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_TRUE(out[i] == expected[i]) << "element " << i;
  });
}

template <class T>
class MaskedFillKernel : public ::testing::Test {};

using Types = ::testing::Types<std::uint8_t, std::uint16_t, std::uint32_t, std::uint64_t, Element16>;
TYPED_TEST_SUITE(MaskedFillKernel, Types);

TYPED_TEST(MaskedFillKernel, Lines) {
  for (const bool in_place : {false, true}) {
    for (const bool shared_mask : {false, true}) {
      for (const std::int64_t bytes : {64, 200, 2048, 40000}) {
        if (kShort && bytes > 4000) continue;
        check<TypeParam>(5, bytes / std::int64_t(sizeof(TypeParam)) + 3, in_place, shared_mask, bytes == 200);
      }
    }
  }
}

TYPED_TEST(MaskedFillKernel, Elements) {
  for (const bool in_place : {false, true}) check<TypeParam>(7 * 111, 1, in_place, false, in_place);
}

}  // namespace
}  // namespace masked_loss::cuda::test
