// The kernels of cross_entropy against the formulas of csrc/common in double precision.
#include "cuda/cross_entropy_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

using Mode = CrossEntropyMode;

struct Case {
  std::int64_t rows, classes;
  int multiprocessors;
  bool clusters;        // whether the kernels are compiled for them
  bool beside = true;   // classes lie beside one another; otherwise rows do
  int lanes = 0;        // of tiles, where they are not to be picked
  bool extras = false;  // class mask, class weights, label smoothing, z-loss
  bool probabilities = false;
  int alike = -1;       // so many elements behind a multiple of 16 bytes all operands but the mask begin; or anywhere
  bool lowest = false;  // many logits are the smallest number, and all of the first row
};

template <class T>
class Problem {
 public:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  Problem(const Case& of, unsigned seed)
      : of_(of),
        random_(seed),
        elements_(std::size_t(of.rows * of.classes)),
        logits_(elements_, of.alike >= 0 ? of.alike : random_() % 8),
        gradient_(elements_, of.alike >= 0 ? of.alike : random_() % 8),
        class_mask_(of.extras ? elements_ : 0, random_() % 8),
        probabilities_(of.probabilities ? elements_ : 0, of.alike >= 0 ? of.alike : random_() % 8),
        weight_(of.classes),
        index_(of.rows),
        order_(of.rows),
        kept_(1),
        coefficient_(of.rows),
        loss_(of.rows),
        softmax_(of.rows) {
    std::normal_distribution<double> normal(0, 3);
    for (T& x : logits_) x = element<T>(normal(random_));
    for (A& w : weight_) w = A(random_() % 8) / 4;
    for (std::int64_t r = 0; r < of.rows; ++r) {
      index_[r] = of.rows > 1 && random_() % 3 == 0 ? -1 : std::int64_t(random_() % of.classes);
      coefficient_[r] = A(random_() % 16) / 8 - A(0.5);
      if (index_[r] >= 0) order_[kept_[0]++] = r;
    }
    for (std::int64_t r = 0, i = kept_[0]; r < of.rows; ++r) {
      if (index_[r] < 0) order_[i++] = r;
    }
    if (of.lowest) {
      const double lowest = std::is_same_v<T, __half> ? -65504 : std::is_same_v<T, float> ? -3.4028234e38 : -3.38e38;
      for (std::int64_t r = 0; r < of.rows; ++r) {
        for (std::int64_t c = 0; c < of.classes; ++c) {
          if (r == 0 || (c != index_[r] && (c / 1000 + r) % 3 != 0)) logits_[offset(r, c)] = element<T>(lowest);
        }
      }
    }
    if (of.extras) {
      for (auto& allowed : class_mask_) allowed = mask_byte(random_() % 4 != 0, random_);
      // Rows have an allowed class, which is the target but in one row.
      for (std::int64_t r = 0; r < of.rows; ++r) {
        if (index_[r] >= 0 && r % 4 != 3) class_mask_[offset(r, index_[r])] = mask_byte(true, random_);
        class_mask_[offset(r, 0)] = mask_byte(true, random_);
      }
    }
    if (of.probabilities) {
      for (std::int64_t r = 0; r < of.rows; ++r) {
        for (std::int64_t c = 0; c < of.classes; ++c) {
          const bool positive = random_() % 4 != 0 && (r % 4 == 3 || allows(r, c));
          probabilities_[offset(r, c)] = element<T>(positive ? double(random_() % 256) / 128 / double(of.classes) : 0);
        }
        if (index_[r] >= 0) index_[r] = 0;
      }
    }
    for (std::int64_t r = 0; r < of.rows; ++r) expected_.push_back(softmax_of(r));
  }

  RowRegime::Kind check(Mode mode) {
    std::fill(gradient_.begin(), gradient_.end(), element<T>(std::nan("")));
    std::fill(loss_.begin(), loss_.end(), A(7));
    for (std::int64_t r = 0; r < of_.rows; ++r) {
      const auto& softmax = expected_[r];
      softmax_[r] = mode == Mode::Backward ? Softmax<A>{A(softmax.max), A(softmax.sum)} : Softmax<A>{A(7), A(7)};
    }
    const auto regime = run(mode);
    const auto what = "kind " + std::to_string(regime.kind) + " width " + std::to_string(regime.width) + " slices " +
                      std::to_string(regime.slices) + " lanes " + std::to_string(regime.shape.lanes) + " mode " +
                      std::to_string(int(mode)) + " rows " + std::to_string(of_.rows) + " classes " +
                      std::to_string(of_.classes) + " extras " + std::to_string(of_.extras) + " probabilities " +
                      std::to_string(of_.probabilities);
    SCOPED_TRACE(what);
    for (std::int64_t r = 0; r < of_.rows; ++r) check_row(mode, r);
    return regime.kind;
  }

 private:
  std::int64_t offset(std::int64_t row, std::int64_t c) const {
    return of_.beside ? row * of_.classes + c : c * of_.rows + row;
  }
  bool allows(std::int64_t row, std::int64_t c) { return !of_.extras || class_mask_[offset(row, c)]; }

  RowRegime run(Mode mode) {
    CrossEntropyCall<T, A> call{};
    auto& work = call.work;
    const std::int64_t row_stride = of_.beside ? of_.classes : 1, class_stride = of_.beside ? 1 : of_.rows;
    work.rows = make_rows<4>({of_.rows}, {{row_stride}, {row_stride}, {row_stride}, {row_stride}});
    work.classes = of_.classes;
    work.logits = logits_.data();
    work.gradient = mode == Mode::Forward ? nullptr : gradient_.data();
    work.logits_stride = work.gradient_stride = work.class_mask_stride = work.probabilities_stride = class_stride;
    work.probabilities = of_.probabilities ? probabilities_.data() : nullptr;
    work.class_mask = of_.extras ? class_mask_.data() : nullptr;
    work.weight = of_.extras ? weight_.data() : nullptr;
    work.label_smoothing = smoothing();
    work.z_loss = z_loss();
    work.index = index_.data();
    work.coefficient = coefficient_.data();
    work.loss = loss_.data();
    work.softmax = softmax_.data();
    call.order = order_.data();
    call.kept = kept_.data();
    emulation::ptx_version = of_.clusters ? 90 : 89;
    auto facts = cross_entropy_facts(work);
    facts.ring_blocks = cross_entropy_ring_blocks(work, mode);
    auto regime = pick_cross_entropy_regime(facts, cross_entropy_extras(work), of_.multiprocessors);
    if (of_.lanes > 0) regime.shape = {of_.lanes, 128};
    Buffer<unsigned char> parts(of_.rows * regime.slices * cross_entropy_part_bytes(work));
    call.parts = parts.data();
    run_cross_entropy(call, mode, regime, of_.multiprocessors, nullptr);
    return regime;
  }

  A smoothing() const { return of_.extras ? A(0.125) : A(0); }
  A z_loss() const { return of_.extras ? A(0.01) : A(0); }

  Softmax<double> softmax_of(std::int64_t row) {
    Softmax<double> softmax;
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (allows(row, c)) softmax = merge(softmax, {number(logits_[offset(row, c)]), 1.0});
    }
    return softmax;
  }

  void check_row(Mode mode, std::int64_t r) {
    const auto target = index_[r];
    if (target < 0) {
      // Its loss is the plan's to write.
      if (mode != Mode::Forward) check_zeros(r);
      if (mode != Mode::Backward) {
        ASSERT_EQ(double(loss_[r]), 7);
      }
      return;
    }
    const auto& softmax = expected_[r];
    ClassSums sums, target_sums;
    const auto weight_of = [&](std::int64_t c) { return of_.extras ? double(weight_[c]) : 1.0; };
    const auto probability_of = [&](std::int64_t c) { return number(probabilities_[offset(r, c)]); };
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (!allows(r, c)) {
        target_sums.classes += of_.probabilities && probability_of(c) > 0;
        continue;
      }
      const double weight = weight_of(c), x = number(logits_[offset(r, c)]);
      sums = sums + ClassSums{weight * x, weight, 1};
      const double probable = of_.probabilities ? weight * probability_of(c) : 0;
      target_sums = target_sums + ClassSums{probable * x, probable, 0};
    }
    const CrossEntropyRow<double> row{double(coefficient_[r]), of_.probabilities ? 1.0 : weight_of(target), smoothing(),
                                      z_loss(), sums};
    if (mode != Mode::Backward) {
      const double loss = of_.probabilities ? cross_entropy_loss(row, softmax, std::log(softmax.sum), target_sums)
                                            : cross_entropy_loss(row, softmax, std::log(softmax.sum),
                                                                 number(logits_[offset(r, target)]), allows(r, target));
      const double scale = 4 + std::abs(loss);
      if (std::isfinite(loss)) {
        ASSERT_NEAR(double(loss_[r]), loss, (sizeof(A) == 8 ? 1e-12 : 4e-6) * scale) << "row " << r;
      } else {
        ASSERT_EQ(std::isnan(loss), std::isnan(loss_[r])) << "row " << r;
        if (!std::isnan(loss)) {
          ASSERT_EQ(double(loss_[r]), loss) << "row " << r;
        }
      }
    }
    if (mode == Mode::Forward) {
      const double max = softmax_[r].max, sum = softmax_[r].sum, lse = max + std::log(sum);
      ASSERT_NEAR(lse, log_sum_exp(softmax), (sizeof(A) == 8 ? 1e-12 : 4e-6) * (4 + std::abs(lse))) << "row " << r;
      return;
    }
    const double target_sum = of_.probabilities ? target_sums.weight : row.target_weight;
    const auto terms = cross_entropy_gradient(row, log_sum_exp(softmax), target_sum);
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      double expected = 0, size = 0;
      const auto add = [&](double term) { expected += term, size += std::abs(term); };
      if (allows(r, c)) {
        add(terms.probability * std::exp(number(logits_[offset(r, c)]) - softmax.max) / softmax.sum);
        add(-terms.smoothing * weight_of(c));
        if (of_.probabilities) {
          add(-terms.target * weight_of(c) * probability_of(c));
        } else if (c == target) {
          add(-terms.target);
        }
      }
      // Each term is rounded at its own size, the result to the dtype, whose smallest numbers have fewer digits.
      // Probabilities bring one more rounding to each.
      const double tolerance = (of_.probabilities ? 2 : 1) * kRounding<A> * size + kRounding<T> * std::abs(expected) +
                               (sizeof(T) == 2 ? 1e-7 : 0);
      ASSERT_NEAR(number(gradient_[offset(r, c)]), expected, tolerance) << "row " << r << " class " << c;
    }
  }

  void check_zeros(std::int64_t r) {
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      const double zero = number(gradient_[offset(r, c)]);
      ASSERT_TRUE(zero == 0 && !std::signbit(zero)) << "masked row " << r << " class " << c << " " << zero;
    }
  }

  const Case of_;
  std::mt19937 random_;
  std::size_t elements_;
  Buffer<T> logits_, gradient_;
  Buffer<std::uint8_t> class_mask_;
  Buffer<T> probabilities_;
  Buffer<A> weight_;
  Buffer<std::int64_t> index_, order_, kept_;
  Buffer<A> coefficient_, loss_;
  Buffer<Softmax<A>> softmax_;
  std::vector<Softmax<double>> expected_;
};

template <class T>
class CrossEntropyKernel : public ::testing::Test {
 protected:
  static void check(Case of, int random_schedules = 1) {
    for (const auto& [extras, probabilities] : {std::pair(false, false), {true, false}, {false, true}, {true, true}}) {
      if (kShort && extras != probabilities) continue;
      of.extras = extras;
      of.probabilities = probabilities;
      for (const auto mode : {Mode::Forward, Mode::ForwardGrad, Mode::Backward}) {
        Problem<T> problem(of, unsigned(of.classes * 31 + of.rows));
        with_schedules(random_schedules, [&] { problem.check(mode); });
        if (::testing::Test::HasFailure()) return;
      }
    }
  }

  // In no other regime: double alone has no ring.
  static void check_ring(Case of, int random_schedules, int alike = 0) {
    if (std::is_same_v<T, double>) return;
    of.alike = alike;
    for (const auto mode : {Mode::Forward, Mode::ForwardGrad}) {
      Problem<T> problem(of, unsigned(of.classes));
      with_schedules(random_schedules, [&] { EXPECT_EQ(problem.check(mode), RowRegime::Ring); });
      if (::testing::Test::HasFailure()) return;
    }
  }
};

using Types = ::testing::Types<float, double, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(CrossEntropyKernel, Types);

// Few lanes a row, then rows held by 32 to 512 threads, up to rows that do not fit and are read again in tiles. Sizes
// are in bytes, about those of the table of tiles, with tails.
TYPED_TEST(CrossEntropyKernel, RowsOnChip) {
  for (const int bytes : {8, 24, 64, 128, 136, 2040, 2064, 8200, 16400, 32800, 70000, 140008}) {
    if (kShort && bytes > 20000) continue;
    const std::int64_t classes = bytes / std::int64_t(sizeof(TypeParam)) | 1;
    this->check({kShort ? 3 : 5, classes, 1, false});
  }
}

// Blocks that take several rows, one after the other.
TYPED_TEST(CrossEntropyKernel, MoreRowsThanBlocks) {
  this->check({kShort ? 300 : 9000, 3, 1, false});
  for (const auto& [bytes, rows] : {std::pair(200, 300), {8200, 70}, {16400, 40}, {70000, 20}}) {
    if (kShort && bytes > 200) continue;
    this->check({rows, bytes / std::int64_t(sizeof(TypeParam)), 1, false}, 0);
  }
  if (!kShort) this->check({2500, 9, 1, false, /*beside=*/false, /*lanes=*/4});
}

// One row, and many multiprocessors that would have nothing to do.
TYPED_TEST(CrossEntropyKernel, FewRowsInSlices) {
  for (const int bytes : {32776, 70000, 300000}) {
    if (kShort && bytes > 40000) continue;
    this->check({kShort ? 1 : 2, bytes / std::int64_t(sizeof(TypeParam)), 40, false});
  }
}

// A row of more than one block's memory is held by a cluster of 2, 4 or 8.
TYPED_TEST(CrossEntropyKernel, RowsInClusters) {
  for (const int bytes : {4096, 33000, 66000, 135000, 400000}) {
    if (kShort && bytes > 40000) continue;
    this->check({kShort ? 3 : 5, bytes / std::int64_t(sizeof(TypeParam)) - 1, 1, true});
  }
  this->check({1, 40000 / std::int64_t(sizeof(TypeParam)), 8, true});
}

// The GPU has clusters, and has compiled the kernels from the PTX of one that has not.
TYPED_TEST(CrossEntropyKernel, RowsOfClustersFromOlderPtx) {
  for (const int bytes : {33000, 135000}) {
    if (kShort && bytes > 40000) continue;
    this->check({kShort ? 3 : 5, bytes / std::int64_t(sizeof(TypeParam)) - 1, 1, false}, 0);
  }
}

TEST(CrossEntropyRegime, ClustersAreUpToWhatTheKernelsAreCompiledFor) {
  for (const int version : {75, 80, 89, 90, 100, 120}) {
    emulation::ptx_version = version;
    for (const std::int64_t rows : {2048, 20}) {  // of 128 KB
      const RowFacts facts{rows, 32000, 4, true, true, false, /*ring_blocks=*/1};
      const auto regime = pick_cross_entropy_regime(facts, CrossEntropyExtras::None, 132);
      EXPECT_EQ(regime.kind == RowRegime::Ring, version >= 90 && rows == 2048) << version;
      EXPECT_EQ(regime.kind == RowRegime::Packs && regime.slices > 1, rows == 20) << version;
    }
  }
  emulation::ptx_version = 90;
}

// Rows in a ring of chunks, by one block or a cluster; fewer rows than groups of warps, and so many that the ring is
// filled again. Not all blocks of a cluster have as many chunks.
TYPED_TEST(CrossEntropyKernel, RowsInARing) {
  for (const auto& [bytes, rows] :
       {std::pair(32768, 30), {49168, 9}, {65536, 20}, {98320, 7}, {131088, 5}, {294928, 3}, {400000, 4}}) {
    if (kShort && bytes > 40000) continue;
    const Case of{kShort ? 4 : rows, bytes / std::int64_t(sizeof(TypeParam)), 1, true};
    this->check_ring(of, bytes < 1 << 16 ? 4 : 1);
  }
}

// Rows that begin anywhere have elements beside packs.
TYPED_TEST(CrossEntropyKernel, UnalignedRowsInARing) {
  for (const auto& [bytes, rows] : {std::pair(32800, 12), {70010, 9}, {200010, 4}}) {
    if (kShort && bytes > 40000) continue;
    for (const int alike : {0, 1, 3}) {
      const Case of{kShort ? 4 : rows, bytes / std::int64_t(sizeof(TypeParam)) | 1, 1, true};
      this->check_ring(of, 1, alike);
    }
  }
}

// Class masks, weights and label smoothing, probabilities, and all of them.
TYPED_TEST(CrossEntropyKernel, ClassesInARing) {
  for (const auto& [bytes, rows, alike] : {std::tuple(32768, 12, 0), {33010, 9, 1}, {100000, 5, 0}, {190010, 4, 2}}) {
    if (kShort && bytes > 40000) continue;
    for (const auto& [extras, probabilities] : {std::pair(true, false), {false, true}, {true, true}}) {
      Case of{kShort ? 4 : rows, (bytes + alike) / std::int64_t(sizeof(TypeParam)), 1, true};
      of.extras = extras;
      of.probabilities = probabilities;
      this->check_ring(of, 2, alike);
    }
  }
}

TYPED_TEST(CrossEntropyKernel, LowestLogitsInARing) {
  Case of{4, 40000 / std::int64_t(sizeof(TypeParam)), 1, true};
  of.lowest = true;
  this->check_ring(of, 1);
}

// Classes that lie apart, as in [B, C, T].
TYPED_TEST(CrossEntropyKernel, ClassesApart) {
  for (const std::int64_t classes : {1, 3, 10, 70, 300}) {
    for (const std::int64_t rows : {1, 37, 70}) {
      if (kShort && (rows > 40 || classes > 100)) continue;
      this->check({rows, classes, 2, false, /*beside=*/false});
    }
  }
}

// Packs of neighbouring rows.
TYPED_TEST(CrossEntropyKernel, RowsInPacks) {
  for (const std::int64_t classes : {2, 21, 70, 300}) {
    if (kShort && classes > 21) continue;
    Case of{24, classes, 1, false, /*beside=*/false};
    of.alike = 0;
    this->check(of);
  }
}

// Whole packs, of several rows a warp, and of a block.
TYPED_TEST(CrossEntropyKernel, WholePacks) {
  for (const std::int64_t classes : {8, 40, 256, 1000, 2048}) {
    if (kShort && classes > 256) continue;
    Case of{11, classes, 1, false};
    of.alike = 0;
    this->check(of);
  }
}

TYPED_TEST(CrossEntropyKernel, ScaleGradient) {
  using A = typename Problem<TypeParam>::A;
  for (const std::int64_t n : {1, 7, 40, 5000}) {
    for (const double by : {1.0, 0.5, -std::numeric_limits<double>::infinity()}) {
      Buffer<TypeParam> gradient(n, n % 3);
      Buffer<A> factor(1);
      factor[0] = A(by);
      for (std::int64_t i = 0; i < n; ++i) gradient[i] = element<TypeParam>(i % 5 == 0 ? 0 : double(i % 7) - 3);
      scale_gradient(gradient.data(), n, factor.data(), 1, nullptr);
      for (std::int64_t i = 0; i < n; ++i) {
        const double before = i % 5 == 0 ? 0 : double(i % 7) - 3, expected = before == 0 ? 0.0 : before * by;
        const double actual = number(gradient[i]);
        ASSERT_EQ(actual, expected) << i;
        if (before == 0) {
          ASSERT_FALSE(std::signbit(actual)) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
