// Moments, and what is computed from them for every element.
#include <algorithm>

#include "bench.h"
#include "cuda/reductions_kernel.h"

namespace masked_loss::cuda::bench {
namespace {

enum class Over { All, Rows, Columns };  // what one result is of

// Half of the elements are masked.
template <class T>
class MomentsOver {
 public:
  using A = float;

  MomentsOver(std::int64_t rows, std::int64_t columns, Over over, int order)
      : rows_(rows),
        columns_(columns),
        over_(over),
        order_(order),
        input_(rows * columns, [this] { return element<T>(1 + random_.normal(1)); }),
        mask_(rows * columns, [this] { return std::uint8_t(random_.next() % 2); }),
        first_(results_count()),
        second_(results_count()),
        count_(results_count()),
        memory_(moments_bytes(work())) {}

  void run(cudaStream_t stream) const {
    const MomentsResult<A> result{first_.data(), order_ < 2 ? nullptr : second_.data(),
                                  order_ < 1 ? nullptr : count_.data()};
    find_moments(work(), order_, memory_.data(), result, stream);
  }

  std::vector<Result> results() const { return {{first_.data(), std::size_t(first_.size()) * sizeof(A)}}; }
  double bytes() const { return double(input_.size()) * (sizeof(T) + 1); }

  double error() const {
    Errors errors;
    if (over_ == Over::All) {
      check(errors, 0, std::min(input_.size(), kPeriod),
            [&](std::int64_t i) { return std::pair(i, double((input_.size() - 1 - i) / kPeriod + 1)); });
    } else {
      for (const auto at : sample(results_count())) {
        const bool of_row = over_ == Over::Rows;
        check(errors, at, of_row ? columns_ : rows_,
              [&](std::int64_t i) { return std::pair(of_row ? at * columns_ + i : i * columns_ + at, 1.0); });
      }
    }
    return errors.worst();
  }

 private:
  std::int64_t results_count() const { return over_ == Over::All ? 1 : over_ == Over::Rows ? rows_ : columns_; }

  MomentsWork<T> work() const {
    const auto rows = [](std::int64_t n, std::int64_t stride) { return make_rows<2>({n}, {{stride}, {stride}}); };
    const auto none = make_rows<2>({}, {{}, {}});
    switch (over_) {
      case Over::All: return {none, rows(rows_ * columns_, 1), input_.data(), mask_.data()};
      case Over::Rows: return {rows(rows_, columns_), rows(columns_, 1), input_.data(), mask_.data()};
      default: return {rows(columns_, 1), rows(rows_, columns_), input_.data(), mask_.data()};
    }
  }

  // place(i): an element, and how often there is one like it.
  template <class Place>
  void check(Errors& errors, std::int64_t at, std::int64_t n, const Place& place) const {
    double sum = 0, size = 0, count = 0, squares = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const auto [element, times] = place(i);
      if (mask_[element] == 0) continue;
      const double x = number(input_[element]);
      sum += times * x, size += times * std::abs(x), count += times;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const auto [element, times] = place(i);
      if (mask_[element] == 0) continue;
      const double d = number(input_[element]) - sum / count;
      squares += times * d * d;
    }
    const double by = order_ == 0 ? 1 : count;
    errors.compare(double(first_.host(at)), sum / by, 2e-5 * size / by);
    if (order_ > 0) errors.compare(double(count_.host(at)), count, 1e-9);
    if (order_ == 2) errors.compare(double(second_.host(at)), squares, 5e-5 * squares);
  }

  const std::int64_t rows_, columns_;
  const Over over_;
  const int order_;
  Random random_{19};
  const Repeated<T> input_;
  const Repeated<std::uint8_t> mask_;
  const Array<A> first_, second_;
  const Array<std::int64_t> count_;
  const Array<char> memory_;
};

template <class T>
Case moments_case(std::int64_t rows, std::int64_t columns, Over over, int order) {
  const char* orders[] = {"sum", "mean", "var"};
  const char* overs[] = {" of all ", " of rows ", " of columns "};
  const auto name = std::string("masked_") + orders[order] + overs[int(over)] + dtype_name<T>() + " " +
                    std::to_string(rows) + "x" + std::to_string(columns);
  return {name, [=] {
            const auto moments = std::make_shared<MomentsOver<T>>(kEmulated ? std::min<std::int64_t>(rows, 64) : rows,
                                                                  shrunk(columns, 600), over, order);
            return Job{moments->bytes(),
                       [moments](cudaStream_t stream) { moments->run(stream); },
                       [moments] { return moments->error(); },
                       moments->results(),
                       {}};
          }};
}

// A gradient: scale (input - mean) of each row.
template <class T>
Case affine_case(std::int64_t rows, std::int64_t columns) {
  const auto name =
      std::string("masked_affine ") + dtype_name<T>() + " " + std::to_string(rows) + "x" + std::to_string(columns);
  return {name, [=] {
            const auto R = kEmulated ? std::min<std::int64_t>(rows, 9) : rows, C = shrunk(columns, 600), n = R * C;
            Random random(23);
            const Repeated<T> input(n, [&] { return element<T>(random.normal(1)); });
            const Repeated<std::uint8_t> mask(n, [&] { return std::uint8_t(random.next() % 2); });
            const Repeated<float> scale(R, [&] { return float(random.uniform(0.5, 2)); });
            const Repeated<float> mean(R, [&] { return float(random.normal(1)); });
            const Array<T> result(n);
            constexpr auto type = sizeof(T) == 4 ? ElementType::Float : ElementType::BFloat16;
            const auto of_rows = make_rows<1>({R, C}, {{1, 0}}), of_elements = make_rows<1>({n}, {{1}});
            AffineWork work{n, {}, {}, {}, {}, {}, result.data()};
            work.scale = {scale.data(), ElementType::Float, of_rows};
            work.mean = {mean.data(), ElementType::Float, of_rows};
            work.input = {input.data(), type, of_elements};
            work.mask = {mask.data(), ElementType::Byte, of_elements};
            const auto run = [=](cudaStream_t stream) {
              affine<T>(work, stream);
              (void)input, (void)mask, (void)scale, (void)mean, (void)result;
            };
            const auto error = [=] {
              Errors errors;
              for (const auto i : sample(n, 400)) {
                const auto r = i / C;
                const double x = number(input[i]), s = double(scale[r]), m = double(mean[r]);
                const double expected = mask[i] == 0 ? 0 : s * (x - m);
                errors.compare(number(result.host(i)), expected,
                               kRounding<T> * std::abs(expected) + 1e-6 * s * (std::abs(x) + std::abs(m)));
              }
              return errors.worst();
            };
            return Job{double(n) * (2 * sizeof(T) + 1), run, error, {{result.data(), std::size_t(n) * sizeof(T)}}, {}};
          }};
}

}  // namespace

std::vector<Case> reduction_cases() {
  using bf16 = __nv_bfloat16;
  std::vector<Case> cases;
  const auto add = [&](Case one) { cases.push_back(std::move(one)); };
  for (const int order : {0, 1, 2}) {
    add(moments_case<float>(8192, 8192, Over::All, order));
    add(moments_case<bf16>(8192, 8192, Over::All, order));
  }
  for (const int order : {1, 2}) {
    for (const auto over : {Over::Rows, Over::Columns}) {
      add(moments_case<float>(8192, 8192, over, order));
      add(moments_case<bf16>(8192, 8192, over, order));
    }
  }
  add(moments_case<float>(1 << 20, 64, Over::Rows, 1));
  add(affine_case<float>(8192, 8192));
  add(affine_case<bf16>(8192, 8192));
  return cases;
}

}  // namespace masked_loss::cuda::bench
