// What row programs and the traversals that run them have in common (row_packs.cuh, row_tiles.cuh; row_ring.cuh has its
// own). A row program says what is added up over the classes of a row, and what is then written for each of them. It
// has, beside its dtype T and A, the one that T is computed in,
//
//   kVisits, kWrites         whether a row is visited to add something up, and whether its classes are written
//   kSecond, kFillsSecond    whether there is a second operand, and whether it is 0 where a class is masked
//   kMasks                   whether classes may be masked
//   kPacks, kResident        how many packs of each operand a thread holds, and threads a multiprocessor
//   State, State()           what a part of a row adds up to, and that of none
//   count(), classes()       of the rows, at most, and of each of them
//   end()                    how many rows there are to visit, which the host need not know; row(position) names them
//   strides(), line(row)     between classes, and where the row begins
//   waits()                  whether what a mask drops is not read, because the mask comes from a cache
//   known(row), keeps(known) what is read of a row long before it is visited; rows that are not kept are +0
//   kept_end(row)            nothing is kept from this class on
//   chosen(known)            the class whose part of a row gives the row's results
//   begin(row, known)        what conclude needs to know of a row
//   nothing()                what takes the place of a masked class's input when it is visited
//   visits()                 whether rows of this call are visited
//   visit(state, view)       adds some classes
//   merge(a, b)              in an order that the sizes fix
//   reduce(state, lanes)     the same over neighbouring lanes of a warp, a power of two
//   conclude(row, state, gives)  what write needs; the row's results are given by the thread that is told so
//   write(x, second, class, terms)  what is written for classes side by side, in the place of their inputs
//   masked()                 the same for masked ones
#pragma once

#include "cuda/device.cuh"
#include "cuda/row_regime.h"

namespace masked_loss::cuda {

// Where a row begins; null where a program or a call has none.
template <class T>
struct RowLine {
  const T *input, *second;
  T* output;
  const std::uint8_t* mask;  // a byte each, which keeps where it is not 0
};
struct RowStrides {
  std::int64_t input, second, output, mask;
};

// As many elements side by side, which move at once: one, or a pack. Of half types the compiler would take a register
// for each element; as words they take half of one.
template <class T, int n>
struct Values {
  using A = Accumulation<T>;
  static constexpr int together = 1;  // elements that are written at once
  T values[n];

  __device__ __forceinline__ static Values all(A x) {
    Values unit;
#pragma unroll
    for (T& value : unit.values) value = narrow<T>(x);
    return unit;
  }
  __device__ __forceinline__ static Values load(const T* from) {
    if constexpr (n == 1) {
      return {{*from}};
    } else {
      const auto pack = load_cached(from);
      Values unit;
      memcpy(&unit, &pack, sizeof(unit));
      return unit;
    }
  }
  // From any address.
  __device__ __forceinline__ static Values load_apart(const T* from) {
    Values unit;
#pragma unroll
    for (int j = 0; j < n; ++j) unit.values[j] = from[j];
    return unit;
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (n == 1) {
      *to = values[0];
    } else {
      Pack<T> pack;
      memcpy(&pack, this, sizeof(pack));
      store_streaming(to, pack);
    }
  }
  __device__ __forceinline__ A get(int j) const { return widen(values[j]); }
  __device__ __forceinline__ void set(int j, const A (&x)[1]) { values[j] = narrow<T>(x[0]); }
  // `other` takes the place of the elements whose bits are not set.
  __device__ __forceinline__ void choose(unsigned bits, A other) {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = bits >> j & 1 ? values[j] : narrow<T>(other);
  }
  // The greater of each two elements.
  __device__ __forceinline__ void raise(const Values& by) {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = narrow<T>(greater(widen(values[j]), widen(by.values[j])));
  }
  __device__ __forceinline__ void hold() {}
};

template <class T>
struct Words {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static constexpr int together = 2;
  unsigned words[4];

  __device__ __forceinline__ static unsigned word(const Pair& pair) {
    unsigned word;
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
  __device__ __forceinline__ static Pair pair(unsigned word) {
    Pair pair;
    memcpy(&pair, &word, sizeof(word));
    return pair;
  }
  __device__ __forceinline__ static unsigned rounded(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
      return word(__floats2half2_rn(low, high));
    } else {
      return word(__floats2bfloat162_rn(low, high));
    }
  }

  __device__ __forceinline__ static Words all(float x) {
    Words unit;
#pragma unroll
    for (unsigned& word : unit.words) word = rounded(x, x);
    return unit;
  }
  __device__ __forceinline__ static Words load(const T* from) {
    const auto pack = load_cached(from);
    Words unit;
    memcpy(unit.words, &pack, sizeof(pack));
    return unit;
  }
  __device__ __forceinline__ static Words load_apart(const T* from) {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
    Words unit;
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.words[i] = halves[2 * i] | unsigned(halves[2 * i + 1]) << 16;
    unit.hold();
    return unit;
  }
  __device__ __forceinline__ void store(T* to) const {
    Pack<T> pack;
    memcpy(&pack, words, sizeof(pack));
    store_streaming(to, pack);
  }
  __device__ __forceinline__ float get(int j) const {
    const unsigned word = words[j / 2];
    if constexpr (std::is_same_v<T, __half>) {
      return widen(j % 2 == 0 ? pair(word).x : pair(word).y);
    } else {
      return __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xffff0000);
    }
  }
  __device__ __forceinline__ void set(int j, const float (&x)[2]) { words[j / 2] = rounded(x[0], x[1]); }
  __device__ __forceinline__ void choose(unsigned bits, float other) {
    const unsigned others = rounded(other, other);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned kept = ((bits >> (2 * i) & 3) * 0x8001 & 0x10001) * 0xffff;
      words[i] = (words[i] & kept) | (others & ~kept);
    }
  }
  __device__ __forceinline__ void raise(const Words& by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = word(__hmax2(pair(words[i]), pair(by.words[i])));
  }
  // Makes the compiler hold the words from here on, and not the floats that it had made of them.
  __device__ __forceinline__ void hold() {
#ifdef __CUDACC__
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
#endif
  }
};
template <class T, int n>
using Unit = std::conditional_t<sizeof(T) == 2 && n == 8, Words<T>, Values<T, n>>;

// What a thread holds: units of elements side by side, which are classes of one row or, with kAcross, one class of rows
// side by side.
template <class Program, int kUnits, int kWidth, bool kAcross, class Index>
struct Held {
  using T = typename Program::T;
  using A = typename Program::A;
  using U = Unit<T, kWidth>;
  static constexpr int rows = kAcross ? kWidth : 1, size = kAcross ? kUnits : kUnits * kWidth;
  static constexpr unsigned every = (1u << kWidth) - 1;

  U input[kUnits], second[Program::kSecond ? kUnits : 1];
  unsigned kept_bits[Program::kMasks ? (kUnits * kWidth + 31) / 32 : 1];  // a bit an element
  A greatest[rows];
  Index first, step;  // the class of the first unit, and from one to the next

  __device__ __forceinline__ Index unit_class(int u) const { return first + u * step; }

  __device__ __forceinline__ void set_kept(int u, unsigned bits) {
    const int at = u * kWidth;
    if (at % 32 == 0) kept_bits[at / 32] = 0;
    kept_bits[at / 32] |= bits << at % 32;
  }
  __device__ __forceinline__ void set_all_kept(unsigned long long bits) {
    kept_bits[0] = static_cast<unsigned>(bits);
    if constexpr (kUnits * kWidth > 32) kept_bits[1] = static_cast<unsigned>(bits >> 32);
  }
  __device__ __forceinline__ unsigned kept(int u) const {
    const int at = u * kWidth;
    return Program::kMasks ? kept_bits[Program::kMasks ? at / 32 : 0] >> at % 32 & every : every;
  }

  // After units have been loaded where something may be kept: what is masked gives way to what adds nothing.
  __device__ __forceinline__ void fill() {
    if constexpr (Program::kMasks) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const unsigned bits = kept(u);
        if (bits == every) continue;
        input[u].choose(bits, Program::nothing());
        if constexpr (Program::kSecond && Program::kFillsSecond) second[u].choose(bits, A(0));
      }
    }
  }

  __device__ __forceinline__ void find_greatest() {
    U max = input[0];
#pragma unroll
    for (int u = 1; u < kUnits; ++u) max.raise(input[u]);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      A& of_row = greatest[kAcross ? j : 0];
      of_row = kAcross || j == 0 ? max.get(j) : greater(of_row, max.get(j));
    }
  }

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      input[u].hold();
      if constexpr (Program::kSecond) second[u].hold();
    }
  }

  // The second unit becomes the first one, and the first one the last; for one row.
  __device__ __forceinline__ void rotate() {
    const auto turn = [](U(&units)[kUnits]) {
      const U front = units[0];
#pragma unroll
      for (int u = 1; u < kUnits; ++u) units[u - 1] = units[u];
      units[kUnits - 1] = front;
    };
    turn(input);
    if constexpr (Program::kSecond) turn(second);
    if constexpr (Program::kMasks) {
      unsigned long long bits = kept_bits[0];
      if constexpr (size > 32) bits |= static_cast<unsigned long long>(kept_bits[1]) << 32;
      set_all_kept(bits >> kWidth | (bits & every) << (kUnits - 1) * kWidth);
    }
  }

  // What a program sees of one of the rows.
  struct View {
    static constexpr int size = Held::size, units = kUnits, width = kAcross ? 1 : kWidth;  // units times width
    Held& held;
    const int row;

    __device__ __forceinline__ A x(int i) const { return value(held.input, i); }
    __device__ __forceinline__ A second(int i) const { return value(held.second, i); }
    __device__ __forceinline__ bool kept(int i) const { return held.kept(unit(i)) >> place(i) & 1; }
    __device__ __forceinline__ Index of(int i) const { return held.unit_class(unit(i)) + (kAcross ? 0 : i % kWidth); }
    __device__ __forceinline__ A greatest() const { return held.greatest[row]; }
    __device__ __forceinline__ void hold() const { held.hold(); }  // between two times that elements are asked for
    __device__ __forceinline__ Index step() const { return held.step; }
    __device__ __forceinline__ void rotate() const { held.rotate(); }

   private:
    __device__ __forceinline__ int unit(int i) const { return kAcross ? i : i / kWidth; }
    __device__ __forceinline__ int place(int i) const { return kAcross ? row : i % kWidth; }
    template <int n>
    __device__ __forceinline__ A value(const U (&units)[n], int i) const {
      return units[unit(i)].get(place(i));
    }
  };
  __device__ __forceinline__ View view(int row) { return {*this, row}; }
};

// e^x, of numbers that are not above 0.
__device__ __forceinline__ float exp_of(float x) { return fast_exp2(x * 1.44269504f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// The softmax of a part of a row.
template <class A>
struct SoftmaxPart : Softmax<A> {
  __device__ __forceinline__ A sum_from(A max) const { return this->sum * exp_of(this->max - max); }
};

// `bounded`: infinite elements have an infinite sum, and not one of NaN, which theirs alone is.
template <bool bounded, class A, class View>
__device__ __forceinline__ void add_softmax(SoftmaxPart<A>& part, const View& view) {
  A max = greater(part.max, view.greatest());
  if constexpr (bounded) max = min(max, std::numeric_limits<A>::max());
  constexpr int chains = View::size < 4 ? View::size : 4;
  A sums[chains] = {};
#pragma unroll
  for (int i = 0; i < View::size; ++i) sums[i % chains] += exp_of(view.x(i) - max);
#pragma unroll
  for (int i = 1; i < chains; ++i) sums[0] += sums[i];
  // Few large sums lose less than many terms that are added to one.
  part.sum = part.sum_from(max) + sums[0];
  part.max = max;
}

template <class A>
__device__ __forceinline__ SoftmaxPart<A> merge_softmax(const SoftmaxPart<A>& a, const SoftmaxPart<A>& b) {
  const A max = greater(a.max, b.max);
  return {{max, a.sum_from(max) + b.sum_from(max)}};
}

struct Plus {
  template <class V>
  __device__ __forceinline__ V operator()(const V& a, const V& b) const {
    return a + b;
  }
};

// Of neighbouring lanes, with one exponential a thread.
template <class A>
__device__ __forceinline__ SoftmaxPart<A> reduce_part(const SoftmaxPart<A>& part, int lanes) {
  const A max = reduce_lanes(part.max, lanes, [](A a, A b) { return greater(a, b); });
  return {{max, reduce_lanes(part.sum_from(max), lanes, Plus())}};
}

}  // namespace masked_loss::cuda
