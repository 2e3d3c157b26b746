// The kernels of blocks of logits, and of two heads' logits, against loops in double precision.
#include "cuda/linear_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Divergence { Forward, Reverse, JensenShannon };  // the public one needs torch

struct Case {
  std::int64_t rows = 3, classes = 1;
  bool masked = false;
  bool smooths = false;
};

// Logits that differ much from row to row, of which one class has -inf.
template <class A>
Buffer<A> random_logits(std::int64_t rows, std::int64_t classes, std::mt19937& random, std::size_t shift = 0) {
  std::normal_distribution<double> normal(0, 3);
  Buffer<A> logits(rows * classes, shift);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < classes; ++c) logits[r * classes + c] = A(normal(random) + 100.0 * double(r));
    if (classes > 4) logits[r * classes + 3] = A(-kInfinity);
  }
  return logits;
}

template <class A>
class LinearKernel : public ::testing::Test {
 protected:
  static constexpr double tolerance = sizeof(A) == 8 ? 1e-12 : 3e-5;

  // All classes in two blocks, and what is written from the states of both.
  static void check(const Case& of) {
    SCOPED_TRACE(std::to_string(of.rows) + " rows of " + std::to_string(of.classes) + " classes");
    std::mt19937 random(7);
    const auto n = of.classes;
    auto logits = random_logits<A>(of.rows, n, random);
    Buffer<std::uint8_t> mask(of.masked ? n : 0);
    for (auto& byte : mask) byte = mask_byte(random() % 4 != 0, random);
    if (of.masked) mask[0] = 1;
    Buffer<A> weight(n);
    for (auto& w : weight) w = A(random() % 5) / 2;
    Buffer<std::int64_t> target(of.rows);
    for (std::int64_t r = 0; r < of.rows; ++r) target[r] = r == 1 ? -1 : r * 7919 % n;
    for (auto& t : target) t = t == 3 ? 0 : t;
    Buffer<A> coefficient(of.rows), entropy_grad(of.rows), target_weight(of.rows);
    for (std::int64_t r = 0; r < of.rows; ++r) {
      coefficient[r] = A(1) / A(r + 1), entropy_grad[r] = A(0.25) * A(r), target_weight[r] = A(r % 3) + A(0.5);
    }
    const A smoothing = of.smooths ? A(0.2) : A(0), z_loss = A(0.01);
    Buffer<LinearRow<A>> states(of.rows);
    Buffer<LinearSaved<A>> saved(of.rows);
    Buffer<A> loss(of.rows), entropy(of.rows), gradient(of.rows * n);
    const auto half = n / 2;
    const auto in_blocks = [&](LinearMode mode) {
      for (const auto& [first, size] : {std::pair{std::int64_t(0), half}, std::pair{half, n - half}}) {
        if (size == 0) continue;
        Buffer<A> block(of.rows * size);
        for (std::int64_t r = 0; r < of.rows; ++r) {
          std::copy_n(logits.data() + r * n + first, size, block.data() + r * size);
        }
        LinearWork<A> work{};
        work.rows = make_rows<4>({of.rows}, {{size}, {size}, {0}, {0}});
        work.classes = size;
        work.first = first;
        work.logits = work.gradient = block.data();
        work.class_mask = of.masked ? mask.data() + first : nullptr;
        work.weight = weight.data() + first;
        work.target = target.data();
        work.state = states.data();
        work.saved = saved.data();
        work.coefficient = coefficient.data();
        work.entropy_grad = entropy_grad.data();
        work.target_weight = target_weight.data();
        work.label_smoothing = smoothing;
        work.z_loss = z_loss;
        run_linear(work, mode, 2, nullptr);
        for (std::int64_t r = 0; r < of.rows; ++r) {
          std::copy_n(block.data() + r * size, size, gradient.data() + r * n + first);
        }
      }
    };
    in_blocks(LinearMode::Visit);
    conclude_linear(LinearConclusion<A>{states.data(), target.data(), coefficient.data(), target_weight.data(),
                                        smoothing, z_loss, loss.data(), entropy.data(), saved.data()},
                    of.rows, nullptr);
    in_blocks(LinearMode::Write);
    for (std::int64_t r = 0; r < of.rows; ++r) {
      if (target[r] < 0) {
        ASSERT_EQ(loss[r], 0);
        ASSERT_EQ(entropy[r], 0);
        for (std::int64_t c = 0; c < n; ++c) ASSERT_EQ(gradient[r * n + c], 0);
        continue;
      }
      const auto allowed = [&](std::int64_t c) { return !of.masked || mask[c] != 0; };
      const auto x = [&](std::int64_t c) { return allowed(c) ? number(logits[r * n + c]) : -kInfinity; };
      double max = -kInfinity, sum = 0, mean = 0, weights = 0, count = 0, spread = 0;
      for (std::int64_t c = 0; c < n; ++c) max = std::max(max, x(c));
      for (std::int64_t c = 0; c < n; ++c) sum += std::exp(x(c) - max);
      const double lse = max + std::log(sum);
      for (std::int64_t c = 0; c < n; ++c) {
        if (x(c) != -kInfinity) mean += std::exp(x(c) - lse) * (x(c) - max);
        if (!allowed(c)) continue;
        weights += weight[c], count += 1;
        if (weight[c] != 0) spread += weight[c] * (lse - x(c));
      }
      const double w = target_weight[r];
      double expected = (1 - smoothing) * w * (lse - x(target[r])) + z_loss * w * lse * lse;
      if (of.smooths) expected += smoothing / count * spread;
      if (!allowed(target[r])) expected = kInfinity;
      expected *= coefficient[r];
      if (std::isfinite(expected)) {
        ASSERT_NEAR(loss[r], expected, tolerance * (1 + std::abs(expected)));
      } else {
        ASSERT_EQ(loss[r], A(expected));
      }
      ASSERT_NEAR(entropy[r], std::log(sum) - mean, 10 * tolerance);
      for (std::int64_t c = 0; c < n; ++c) {
        const double p = std::exp(x(c) - lse), shift = x(c) == -kInfinity ? 0 : x(c) - max;
        double g = p * ((1 - smoothing) * w + 2 * z_loss * w * lse);
        if (of.smooths) g += smoothing / count * (weights * p - weight[c]);
        if (c == target[r]) g -= (1 - smoothing) * w;
        g = coefficient[r] * g - entropy_grad[r] * p * (shift - mean);
        if (!allowed(c)) g = 0;
        ASSERT_NEAR(gradient[r * n + c], g, 10 * tolerance) << "row " << r << ", class " << c;
      }
    }
  }

  static void check_divergence(const Case& of, Divergence kind, double beta, bool in_place) {
    SCOPED_TRACE(std::to_string(of.classes) + " classes, kind " + std::to_string(int(kind)));
    std::mt19937 random(11);
    const auto n = of.classes;
    auto x = random_logits<A>(of.rows, n, random), t = random_logits<A>(of.rows, n, random);
    const std::vector<A> was_x(x.begin(), x.end()), was_t(t.begin(), t.end());
    Buffer<std::uint8_t> mask(of.masked ? of.rows * n : 0);
    for (auto& byte : mask) byte = mask_byte(random() % 4 != 0, random);
    for (std::int64_t r = 0; of.masked && r < of.rows; ++r) mask[r * n] = 1;
    Buffer<std::int64_t> index(of.rows);
    if (of.rows > 1) index[1] = -1;
    Buffer<A> coefficient(of.rows), loss(of.rows), of_x(of.rows * n), of_t(of.rows * n);
    for (std::int64_t r = 0; r < of.rows; ++r) coefficient[r] = A(0.5) - A(r);
    A *gradient = in_place ? x.data() : of_x.data(), *target_gradient = in_place ? t.data() : of_t.data();
    const DivergenceWork<A> work{of.rows,
                                 n,
                                 x.data(),
                                 t.data(),
                                 gradient,
                                 target_gradient,
                                 of.masked ? mask.data() : nullptr,
                                 n,
                                 index.data(),
                                 coefficient.data(),
                                 loss.data(),
                                 A(beta)};
    with_divergence(kind, beta, [&](auto constant) { run_divergence(work, constant(), 2, nullptr); });
    for (std::int64_t r = 0; r < of.rows; ++r) {
      if (index[r] < 0) {
        ASSERT_EQ(loss[r], 0);
        for (std::int64_t c = 0; c < n; ++c) ASSERT_EQ(gradient[r * n + c] + target_gradient[r * n + c], 0);
        continue;
      }
      const auto log_softmax = [&](const std::vector<A>& of_head) {
        std::vector<double> log_p(n, -kInfinity);
        double max = -kInfinity, sum = 0;
        for (std::int64_t c = 0; c < n; ++c) {
          if (!of.masked || mask[r * n + c] != 0) log_p[c] = number(of_head[r * n + c]);
          max = std::max(max, log_p[c]);
        }
        for (const double z : log_p) sum += std::exp(z - max);
        for (double& z : log_p) z -= max + std::log(sum);
        return log_p;
      };
      const auto log_p = log_softmax(was_x), log_q = log_softmax(was_t);
      const bool forward = kind == Divergence::Forward || (kind == Divergence::JensenShannon && beta == 0);
      const bool reverse = kind == Divergence::Reverse || (kind == Divergence::JensenShannon && beta == 1);
      const double b = forward ? 0 : reverse ? 1 : beta, of_target = forward ? 1 : b, of_input = forward ? 0 : 1 - b;
      std::vector<double> of_p(n), of_q(n);  // log p - log m, log q - log m
      double kl_p = 0, kl_q = 0;
      for (std::int64_t c = 0; c < n; ++c) {
        const double p = std::exp(log_p[c]), q = std::exp(log_q[c]);
        const double log_m = forward ? log_p[c] : reverse ? log_q[c] : std::log(b * q + (1 - b) * p);
        of_p[c] = p == 0 ? 0 : log_p[c] - log_m, of_q[c] = q == 0 ? 0 : log_q[c] - log_m;
        kl_p += p * of_p[c], kl_q += q * of_q[c];
      }
      const double scale = 20 * tolerance * (1 + std::abs(coefficient[r]));
      const double share_p = reverse ? 1 : of_input, share_q = reverse ? 0 : of_target;
      ASSERT_NEAR(loss[r], coefficient[r] * (share_q * kl_q + share_p * kl_p),
                  20 * tolerance * (1 + std::abs(kl_p) + std::abs(kl_q)) * (1 + std::abs(coefficient[r])))
          << "row " << r;
      for (std::int64_t c = 0; c < n; ++c) {
        const double p = std::exp(log_p[c]), q = std::exp(log_q[c]);
        const double wanted_p = forward ? p - q : share_p * p * (of_p[c] - kl_p);
        const double wanted_q = reverse ? q - p : share_q * q * (of_q[c] - kl_q);
        ASSERT_NEAR(gradient[r * n + c], coefficient[r] * wanted_p, scale) << "row " << r << ", class " << c;
        ASSERT_NEAR(target_gradient[r * n + c], coefficient[r] * wanted_q, scale) << "row " << r << ", class " << c;
      }
    }
  }
};

using Numbers = ::testing::Types<float, double>;
TYPED_TEST_SUITE(LinearKernel, Numbers);

TYPED_TEST(LinearKernel, VisitsAndWritesBlocks) {
  for (const std::int64_t classes : {1, 2, 37, 513, 9000}) {
    for (const bool masked : {false, true}) {
      this->check({.classes = classes, .masked = masked, .smooths = classes % 2 == 1});
    }
  }
  this->check({.rows = 40, .classes = 5});
  this->check({.rows = 0, .classes = 5});
}

TYPED_TEST(LinearKernel, FindsDivergences) {
  using enum Divergence;
  for (const std::int64_t classes : {1, 2, 37, 5000}) {
    for (const bool masked : {false, true}) {
      this->check_divergence({.classes = classes, .masked = masked}, Forward, 0.5, masked);
      this->check_divergence({.classes = classes, .masked = masked}, Reverse, 0.5, !masked);
      this->check_divergence({.classes = classes, .masked = masked}, JensenShannon, 0.3, masked);
    }
  }
  this->check_divergence({.rows = 40, .classes = 5}, JensenShannon, 0, true);
  this->check_divergence({.rows = 2, .classes = 5}, JensenShannon, 1, false);
  this->check_divergence({.rows = 0, .classes = 5}, Forward, 0, false);
}

template <class T>
class SoftenedKernel : public ::testing::Test {};
using Elements = ::testing::Types<float, double, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(SoftenedKernel, Elements);

TYPED_TEST(SoftenedKernel, SoftensAndHardens) {
  using T = TypeParam;
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (const std::int64_t n : {0, 1, 3, 4, 1027}) {
    for (const A cap : {A(0), A(5)}) {
      for (const A temperature : {A(1), A(0.5)}) {
        std::mt19937 random(3);
        std::normal_distribution<double> normal(0, 6);
        Buffer<A> logits(n), gradient(n);
        for (A& x : logits) x = A(normal(random));
        for (A& g : gradient) g = random() % 5 == 0 ? A(-0.0) : A(normal(random));
        const std::vector<A> before(logits.begin(), logits.end());
        soften(logits.data(), n, cap, temperature, 1, nullptr);
        Buffer<T> out(n);
        harden(out.data(), gradient.data(), logits.data(), n, cap, temperature, 1, nullptr);
        for (std::int64_t i = 0; i < n; ++i) {
          const double x = before[i], t = cap == 0 ? 0 : std::tanh(x / cap);
          ASSERT_NEAR(logits[i], (cap == 0 ? x : cap * t) / temperature, 1e-5);
          const double wanted = gradient[i] * (1 - t * t) / temperature;
          ASSERT_NEAR(number(out[i]), wanted, kRounding<T> * (1 + std::abs(wanted)) * 4);
          if (gradient[i] == 0) {
            ASSERT_FALSE(std::signbit(number(out[i])));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
