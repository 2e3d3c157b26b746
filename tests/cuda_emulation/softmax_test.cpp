// The kernels of softmax, log_softmax and logsumexp against loops in double precision.
#include "cuda/softmax_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

using Pass = SoftmaxPass;
constexpr Pass kPasses[] = {Pass::Softmax,         Pass::LogSoftmax,         Pass::Logsumexp,
                            Pass::SoftmaxBackward, Pass::LogSoftmaxBackward, Pass::LogsumexpBackward};

enum class Mask { None, Dense, Shared, OfRows, Apart };  // Shared: by all rows; Apart: classes are not neighbours

struct Case {
  std::int64_t rows = 1, classes = 1;
  Mask mask = Mask::Dense;
  bool beside = true;  // classes lie beside one another; otherwise rows do
  bool causal = false;
  std::int64_t gap = 0;     // elements between rows
  bool grad_apart = false;  // classes of what arrives from upstream are not neighbours
  bool special = false;     // infinities and NaN where they are kept
  int multiprocessors = 1;
  int lanes = 0;     // of tiles, where they are not to be picked
  int alike = -1;    // so many elements behind a multiple of 16 bytes all operands but the mask begin; or anywhere
  double value = 0;  // of all elements, where it is not 0
};

template <class T>
class Problem {
 public:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  Problem(const Case& of, Pass pass, unsigned seed)
      : of_(of),
        pass_(pass),
        random_(seed),
        width_((of.beside ? of.classes : of.rows) + of.gap),
        elements_(std::size_t((of.beside ? of.rows : of.classes) * width_)),
        input_(elements_, of.alike >= 0 ? of.alike : random_() % 8),
        grad_(elements_ * (of.grad_apart ? 2 : 1), of.alike >= 0 ? of.alike : random_() % 8),
        result_(elements_, of.alike >= 0 ? of.alike : random_() % 8),
        mask_(of.rows * of.classes, random_() % 8),
        reduced_(of.rows),
        row_grad_(of.rows) {
    std::normal_distribution<double> normal(0, 3);
    for (T& x : input_) x = element<T>(pass == Pass::LogSoftmaxBackward ? -std::abs(normal(random_)) : normal(random_));
    for (T& x : grad_) x = element<T>(normal(random_));
    for (A& x : row_grad_) x = A(normal(random_));
    for (A& x : reduced_) x = A(12);  // so that half types hold what exponentials give
    // Some rows keep nothing, and some packs of others.
    for (std::int64_t r = 0; r < of.rows; ++r) {
      for (std::int64_t c = 0; c < of.classes; ++c) {
        mask_[mask_offset(r, c)] = mask_byte(r % 4 != 3 && (c / 8 + r) % 3 != 0 && random_() % 3 != 0, random_);
      }
    }
    if (of.value != 0) std::fill(input_.begin(), input_.end(), element<T>(of.value));
    if (of.special) {
      constexpr double infinity = std::numeric_limits<double>::infinity(),
                       of_kind[] = {infinity, std::nan(""), -infinity};
      for (std::int64_t r = 0; r < of.rows; ++r) {
        for (std::int64_t c = r; c < of.classes; c += 1 + random_() % (1 + of.classes)) {
          input_[offset(r, c)] = element<T>(of_kind[r % 5 % 3]);
        }
      }
    }
    for (std::int64_t r = 0; r < of.rows; ++r) {
      for (std::int64_t c = 0; c < of.classes; ++c) {
        if (keeps(r, c)) continue;
        input_[offset(r, c)] = element<T>(std::nan(""));
        grad_[grad_offset(r, c)] = element<T>(std::nan(""));
      }
    }
  }

  RowRegime::Kind check() {
    std::fill(result_.begin(), result_.end(), element<T>(7));
    const bool reads = pass_ == Pass::LogsumexpBackward;
    Buffer<A> reduced(of_.rows);
    for (std::int64_t r = 0; r < of_.rows; ++r) reduced[r] = reads ? reduced_[r] : A(7);
    const auto regime = run(reduced);
    SCOPED_TRACE("kind " + std::to_string(regime.kind) + " lanes " + std::to_string(regime.shape.lanes) + " width " +
                 std::to_string(regime.width) + " slices " + std::to_string(regime.slices) + " pass " +
                 std::to_string(int(pass_)) + " rows " + std::to_string(of_.rows) + " classes " +
                 std::to_string(of_.classes) + " mask " + std::to_string(int(of_.mask)) + " causal " +
                 std::to_string(of_.causal));
    for (std::int64_t r = 0; r < of_.rows && !::testing::Test::HasFailure(); ++r) {
      if (pass_ == Pass::Logsumexp) {
        check_number<A>(reduced[r], log_sum_exp(softmax_of(r)), r, -1, 4);
      } else {
        check_row(r);
      }
    }
    if (of_.gap > 0) {
      EXPECT_EQ(number(result_[elements_ - 1]), 7);
    }
    return regime.kind;
  }

 private:
  std::int64_t offset(std::int64_t r, std::int64_t c) const { return of_.beside ? r * width_ + c : c * width_ + r; }
  std::int64_t grad_offset(std::int64_t r, std::int64_t c) const { return offset(r, c) * (of_.grad_apart ? 2 : 1); }
  std::int64_t mask_offset(std::int64_t r, std::int64_t c) const {
    switch (of_.mask) {
      case Mask::Shared: return c;
      case Mask::OfRows: return r;
      case Mask::Apart: return c * of_.rows + r;
      default: return r * of_.classes + c;
    }
  }
  // Causal rows stand in matrices of so many.
  std::int64_t queries() const { return of_.causal ? (of_.rows + 1) / 2 : 0; }
  bool keeps(std::int64_t r, std::int64_t c) {
    return (!of_.causal || c <= r % queries()) && (of_.mask == Mask::None || mask_[mask_offset(r, c)]);
  }

  RowRegime run(Buffer<A>& reduced) {
    const bool forward = pass_ == Pass::Softmax || pass_ == Pass::LogSoftmax || pass_ == Pass::Logsumexp;
    const bool has_grad = pass_ == Pass::SoftmaxBackward || pass_ == Pass::LogSoftmaxBackward;
    const std::int64_t row = of_.beside ? width_ : 1, step = of_.beside ? 1 : width_, twice = of_.grad_apart ? 2 : 1;
    std::vector<std::vector<std::int64_t>> strides{{row}, {}, {}, {}};
    SoftmaxWork<T, A> work{};
    work.classes = of_.classes;
    work.queries = queries();
    if (work.queries > 0) work.by_queries = Quotient(work.queries);
    work.input = input_.data();
    work.input_stride = step;
    work.grad_stride = work.result_stride = work.mask_stride = 1;
    if (has_grad) {
      work.grad = grad_.data();
      work.grad_stride = step * twice;
      strides[3] = {row * twice};
    }
    if (pass_ != Pass::Logsumexp) {
      work.result = result_.data();
      work.result_stride = step;
      strides[1] = {row};
    }
    if (of_.mask != Mask::None) {
      work.mask = mask_.data();
      work.mask_stride = of_.classes > 1 ? mask_offset(0, 1) - mask_offset(0, 0) : 1;
      strides[2] = {of_.rows > 1 ? mask_offset(1, 0) - mask_offset(0, 0) : 0};
    }
    work.rows = make_rows<4>({of_.rows}, strides);
    if (!forward && !has_grad) work.row_grad = row_grad_.data();
    if (pass_ == Pass::Logsumexp || work.row_grad != nullptr) work.reduced = reduced.data();
    auto facts = softmax_facts(work);
    facts.ring_blocks = softmax_ring_blocks(work, pass_);
    auto regime = pick_softmax_regime(pass_, facts, of_.multiprocessors);
    if (of_.lanes > 0) regime.shape = {of_.lanes, 128};
    Buffer<A> parts(of_.rows * regime.slices * 2);
    run_softmax(work, pass_, regime, parts.data(), of_.multiprocessors, nullptr);
    return regime;
  }

  Softmax<double> softmax_of(std::int64_t r) {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    bool nan = false;
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (!keeps(r, c)) continue;
      max = std::max(max, number(input_[offset(r, c)]));
      nan |= std::isnan(number(input_[offset(r, c)]));
    }
    if (nan) return {max, std::nan("")};
    if (std::isinf(max)) return {max, 1};
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (keeps(r, c)) sum += std::exp(number(input_[offset(r, c)]) - max);
    }
    return {max, sum};
  }

  void check_row(std::int64_t r) {
    const bool forward = pass_ == Pass::Softmax || pass_ == Pass::LogSoftmax;
    const auto softmax = forward ? softmax_of(r) : Softmax<double>{};
    const double lse = log_sum_exp(softmax), log_sum = std::log(softmax.sum),
                 masked = pass_ == Pass::LogSoftmax ? -HUGE_VAL : 0;
    double sum = 0, size = 0;
    for (std::int64_t c = 0; c < of_.classes && !forward; ++c) {
      if (!keeps(r, c)) continue;
      const double y = number(input_[offset(r, c)]), grad = number(grad_[grad_offset(r, c)]);
      const double term = pass_ == Pass::SoftmaxBackward ? y * grad : grad;
      sum += term, size += std::abs(term);
    }
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      const double actual = number(result_[offset(r, c)]);
      if (!keeps(r, c)) {
        ASSERT_TRUE(actual == masked && std::signbit(actual) == std::signbit(masked))
            << r << ", " << c << ": " << actual;
        continue;
      }
      const double x = number(input_[offset(r, c)]), grad = number(grad_[grad_offset(r, c)]);
      double expected = 0, terms = 0;
      switch (pass_) {
        case Pass::Softmax: expected = std::isinf(lse) ? std::nan("") : std::exp(x - softmax.max) / softmax.sum; break;
        case Pass::LogSoftmax:
          expected = std::isinf(lse) ? std::nan("") : x - softmax.max - log_sum, terms = std::abs(x) + std::abs(lse);
          break;
        case Pass::SoftmaxBackward: expected = x * (grad - sum), terms = std::abs(x) * (std::abs(grad) + size); break;
        case Pass::LogSoftmaxBackward:
          expected = grad - std::exp(x) * sum, terms = std::abs(grad) + std::exp(x) * size;
          break;
        default: expected = std::exp(x - double(reduced_[r])) * double(row_grad_[r]); break;
      }
      check_number<T>(result_[offset(r, c)], expected, r, c, terms);
      if (::testing::Test::HasFailure()) return;
    }
  }

  // `terms`: what has cancelled.
  template <class V>
  void check_number(V actual, double expected, std::int64_t r, std::int64_t c, double terms) {
    if (!std::isfinite(expected)) {
      ASSERT_TRUE(std::isnan(expected) ? std::isnan(number(actual)) : number(actual) == expected)
          << "row " << r << " class " << c << ": " << number(actual) << ", not " << expected;
      return;
    }
    const double tolerance = kRounding<V> * std::abs(expected) + kRounding<A> * 4 * (terms + std::abs(expected)) +
                             (sizeof(V) == 2 ? 1e-7 : 1e-30);
    ASSERT_NEAR(number(actual), expected, tolerance) << "row " << r << " class " << c;
  }

  const Case of_;
  const Pass pass_;
  std::mt19937 random_;
  std::int64_t width_;
  std::size_t elements_;
  Buffer<T> input_, grad_, result_;
  Buffer<std::uint8_t> mask_;
  Buffer<A> reduced_, row_grad_;
};

template <class T>
class SoftmaxKernel : public ::testing::Test {
 protected:
  static void check(const Case& of, int random_schedules = 1) {
    for (const auto pass : kPasses) {
      if ((of.special || of.value != 0) && int(pass) > int(Pass::Logsumexp)) continue;
      Problem<T> problem(of, pass, unsigned(of.classes * 31 + of.rows));
      with_schedules(random_schedules, [&] { problem.check(); });
      if (::testing::Test::HasFailure()) return;
    }
  }

  // In no other regime, but for what has no ring.
  static void check_ring(Case of, int random_schedules = 1) {
    if (std::is_same_v<T, double>) return;
    for (const auto pass : kPasses) {
      if (pass == Pass::LogsumexpBackward || (of.special && int(pass) > int(Pass::Logsumexp))) continue;
      Problem<T> problem(of, pass, unsigned(of.classes * 31 + of.rows));
      with_schedules(random_schedules, [&] { EXPECT_EQ(problem.check(), RowRegime::Ring); });
      if (::testing::Test::HasFailure()) return;
    }
  }
};

using Types = ::testing::Types<float, double, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(SoftmaxKernel, Types);

// Few lanes a row, a warp, blocks of 128 to 512 threads, and rows of several tiles, with tails.
TYPED_TEST(SoftmaxKernel, RowsOnChip) {
  for (const std::int64_t classes : {1, 31, 33, 129, 512, 1000, 1500, 2049, 4100, 8200, 16500, 33000}) {
    if (kShort && classes > 2100) continue;
    for (const auto mask : {Mask::None, Mask::Dense}) {
      if (kShort && mask == Mask::None) continue;
      this->check({.rows = kShort ? 3 : 5, .classes = classes, .mask = mask}, classes < 5000);
    }
  }
}

TYPED_TEST(SoftmaxKernel, Masks) {
  for (const auto mask : {Mask::None, Mask::Dense, Mask::Shared, Mask::OfRows, Mask::Apart}) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t classes : {7, 150, 2501}) {
        if (kShort && classes > 200) continue;
        this->check({.rows = 10, .classes = classes, .mask = mask, .causal = causal});
      }
      this->check({.rows = 6, .classes = 70, .mask = mask, .beside = false, .causal = causal});
    }
  }
}

// The diagonal goes through the tiles of a row, of which those behind it are not read.
TYPED_TEST(SoftmaxKernel, CausalTiles) {
  if (kShort) return;
  this->check({.rows = 2 * 1100, .classes = 1100, .mask = Mask::None, .causal = true}, 0);
  this->check({.rows = 4, .classes = 40000, .mask = Mask::None, .causal = true}, 0);
}

// Operands that are not aligned alike, and memory between rows that is left alone.
TYPED_TEST(SoftmaxKernel, Strides) {
  for (const std::int64_t gap : {1, 8, 13}) {
    this->check({.rows = 4, .classes = 300, .gap = gap});
    this->check({.rows = 40, .classes = 9, .beside = false, .gap = gap});
  }
  this->check({.rows = 5, .classes = 300, .grad_apart = true});
  this->check({.rows = 35, .classes = 20, .beside = false, .grad_apart = true});
}

// Blocks that take several rows, one after the other.
TYPED_TEST(SoftmaxKernel, MoreRowsThanBlocks) {
  this->check({.rows = kShort ? 300 : 9000, .classes = 3});
  for (const auto& [classes, rows] : {std::pair(100, 300), {1100, 70}, {4097, 40}, {8193, 20}}) {
    if (kShort && classes > 100) continue;
    this->check({.rows = rows, .classes = classes}, 0);
  }
  if (!kShort) this->check({.rows = 2500, .classes = 9, .beside = false, .lanes = 4});
}

// Classes that lie apart, as in [B, C, T].
TYPED_TEST(SoftmaxKernel, ClassesApart) {
  for (const std::int64_t classes : {1, 3, 10, 70, 300}) {
    for (const std::int64_t rows : {1, 37, 70}) {
      if (kShort && (rows > 40 || classes > 100)) continue;
      this->check({.rows = rows, .classes = classes, .beside = false, .multiprocessors = 2});
    }
  }
}

// Packs of neighbouring rows, by one lane a row and more, of rows that are held and longer ones.
TYPED_TEST(SoftmaxKernel, RowsInPacks) {
  for (const std::int64_t classes : {2, 9, 21, 70, 300}) {
    for (const auto mask : {Mask::None, Mask::Shared, Mask::OfRows, Mask::Apart}) {
      if (kShort && (classes > 21 || mask == Mask::OfRows)) continue;
      this->check({.rows = 24, .classes = classes, .mask = mask, .beside = false, .alike = 0});
    }
  }
  this->check({.rows = 40, .classes = 30, .mask = Mask::Apart, .beside = false, .gap = 8, .alike = 0});
  if (!kShort) this->check({.rows = 5000, .classes = 5, .mask = Mask::Apart, .beside = false, .alike = 0}, 0);
}

// Whole packs, of several rows a warp, of a warp and of a block.
TYPED_TEST(SoftmaxKernel, WholePacks) {
  for (const std::int64_t classes : {8, 16, 40, 120, 256, 520, 1000, 2048, 4104}) {
    if (kShort && classes > 256) continue;
    for (const auto mask : {Mask::None, Mask::Dense, Mask::Shared}) {
      this->check({.rows = 11, .classes = classes, .mask = mask, .alike = 0});
    }
    this->check({.rows = 11, .classes = classes, .mask = Mask::None, .causal = true, .alike = 0});
  }
  if (!kShort) this->check({.rows = 1500, .classes = 64, .alike = 0}, 0);
}

// One row, and many multiprocessors that would have nothing to do.
TYPED_TEST(SoftmaxKernel, FewRowsInParts) {
  for (const std::int64_t classes : {8200, 17000, 40000, 70001}) {
    if (kShort && classes > 9000) continue;
    for (const bool aligned : {false, true}) {
      this->check({.rows = 2, .classes = classes, .causal = !aligned, .multiprocessors = 20, .alike = aligned ? 0 : -1},
                  !aligned);
    }
  }
}

// All kept elements are the lowest number there is, or the largest one: their exponentials are alike.
TYPED_TEST(SoftmaxKernel, LowestAndLargest) {
  const double largest = std::is_same_v<TypeParam, __nv_bfloat16> ? 3.3895313892515355e38
                         : std::is_same_v<TypeParam, __half>      ? 65504
                         : std::is_same_v<TypeParam, float>       ? std::numeric_limits<float>::max()
                                                                  : std::numeric_limits<double>::max();
  for (const double value : {-largest, largest, -largest / 1.5, -100.0, -200.0}) {
    for (const bool beside : {true, false}) {
      for (const std::int64_t classes : {40, 700}) {
        this->check({.rows = 8, .classes = classes, .beside = beside, .alike = 0, .value = value}, 0);
      }
    }
  }
}

TYPED_TEST(SoftmaxKernel, InfinitiesAndNan) {
  for (const std::int64_t classes : {1, 9, 300, 2100}) {
    if (kShort && classes > 300) continue;
    for (const auto mask : {Mask::None, Mask::Dense}) {
      this->check({.rows = 15, .classes = classes, .mask = mask, .special = true});
      this->check({.rows = 15, .classes = classes, .mask = mask, .beside = false, .special = true});
    }
  }
}

// Long rows in a ring of chunks, by one block or a cluster.
TYPED_TEST(SoftmaxKernel, RowsInARing) {
  for (const auto& [bytes, rows, alike] : {std::tuple(32768, 9, 0), {33010, 9, 1}, {65536, 6, 3}, {190010, 4, 0}}) {
    if (kShort && bytes > 33000) continue;
    const auto classes = bytes / std::int64_t(sizeof(TypeParam));
    if (std::is_same_v<TypeParam, __half> && classes > 40000) continue;  // its gradients are infinite
    for (const auto mask : {Mask::None, Mask::Dense}) {
      this->check_ring({.rows = kShort ? 4 : rows, .classes = classes, .mask = mask, .alike = alike});
    }
  }
}

TYPED_TEST(SoftmaxKernel, MasksInARing) {
  const auto classes = (kShort ? 32770 : 70010) / std::int64_t(sizeof(TypeParam));
  for (const auto mask : {Mask::None, Mask::Dense, Mask::Shared, Mask::OfRows}) {
    for (const bool causal : {false, true}) {
      if (kShort && mask != Mask::OfRows) continue;
      this->check_ring({.rows = 6, .classes = classes, .mask = mask, .causal = causal, .alike = 2}, 0);
    }
  }
}

// The diagonal goes through the chunks of a row, of which those behind it are not read.
TYPED_TEST(SoftmaxKernel, CausalChunks) {
  if (kShort || sizeof(TypeParam) == 8) return;
  const auto classes = 40000 / std::int64_t(sizeof(TypeParam));
  this->check_ring({.rows = 2 * 40, .classes = classes, .mask = Mask::None, .causal = true, .alike = 0}, 0);
}

TYPED_TEST(SoftmaxKernel, InfinitiesAndNanInARing) {
  const auto classes = 33000 / std::int64_t(sizeof(TypeParam));
  for (const auto mask : {Mask::None, Mask::Dense}) {
    this->check_ring({.rows = kShort ? 4 : 15, .classes = classes, .mask = mask, .special = true, .alike = 1});
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
