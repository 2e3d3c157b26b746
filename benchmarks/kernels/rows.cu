// softmax, log_softmax and logsumexp.
#include <algorithm>

#include "bench.h"
#include "cuda/softmax_kernel.h"

namespace masked_loss::cuda::bench {
namespace {

using Pass = SoftmaxPass;

enum class Kept { All, Causal, Half, Padding };  // Half: of the elements; Padding: of the classes, by all rows

struct Shape {
  std::int64_t rows, classes;
  std::int64_t inner = 0;  // classes lie apart: [rows / inner, classes, inner]
};

Shape shrunk(const Shape& of) {
  if (!kEmulated) return of;
  if (of.inner > 0)
    return {2 * bench::shrunk(of.inner, 72), bench::shrunk(of.classes, 80), bench::shrunk(of.inner, 72)};
  return {std::min<std::int64_t>(of.rows, 6), bench::shrunk(of.classes, 20000), 0};
}

template <class T>
class Rowwise {
 public:
  using A = float;

  Rowwise(const Shape& of, Pass pass, Kept kept)
      : of_(of),
        pass_(pass),
        kept_(kept),
        elements_(of.rows * of.classes),
        input_(elements_,
               [this] {
                 const double x = random_.normal(2);
                 return element<T>(pass_ == Pass::LogSoftmaxBackward ? -std::abs(x) - 4
                                   : pass_ == Pass::SoftmaxBackward  ? std::abs(x) / double(of_.classes)
                                                                     : x);
               }),
        result_(pass == Pass::Logsumexp ? 0 : elements_),
        reduced_(of.rows, [this] { return A(12 + random_.uniform()); }),
        row_grad_(of.rows, [this] { return A(random_.normal(1)); }) {
    if (has_grad()) grad_ = {elements_, [this] { return element<T>(random_.normal(1)); }};
    if (kept == Kept::Half || kept == Kept::Padding) {
      mask_ = {kept == Kept::Half ? elements_ : of.classes, [this] { return std::uint8_t(random_.uniform() < 0.5); }};
    }
  }

  SoftmaxWork<T, A> work() const {
    SoftmaxWork<T, A> work{};
    const auto C = of_.classes, inner = of_.inner;
    std::vector<std::int64_t> strides{C}, none, sizes{of_.rows};
    if (inner > 0) strides = {C * inner, 1}, sizes = {of_.rows / inner, inner};
    work.rows = make_rows<4>(sizes, {strides, strides, kept_ == Kept::Half ? strides : none, strides});
    work.classes = C;
    if (kept_ == Kept::Causal) work.queries = queries(), work.by_queries = Quotient(queries());
    work.input = input_.data();
    work.grad = has_grad() ? grad_.data() : nullptr;
    work.result = result_.size() == 0 ? nullptr : result_.data();
    work.mask = mask_.size() == 0 ? nullptr : mask_.data();
    work.input_stride = work.grad_stride = work.result_stride = work.mask_stride = std::max<std::int64_t>(inner, 1);
    work.reduced = reduced_.data();
    work.row_grad = row_grad_.data();
    return work;
  }

  std::function<void(cudaStream_t)> caller(const RowRegime& regime) const {
    const Array<unsigned char> parts(regime.slices > 1 ? of_.rows * regime.slices * kSoftmaxPartBytes<A> : 0);
    return [work = work(), pass = pass_, regime, parts](cudaStream_t stream) {
      run_softmax(work, pass, regime, parts.data(), machine.multiprocessors, stream);
    };
  }
  RowRegime picked() const {
    auto facts = softmax_facts(work());
    facts.ring_blocks = softmax_ring_blocks(work(), pass_);
    return pick_softmax_regime(pass_, facts, machine.multiprocessors);
  }
  std::function<void(cudaStream_t)> best() const { return caller(picked()); }
  std::vector<Variant> variants() const {
    std::vector<Variant> all;
    for (const auto& regime : other_regimes(picked())) all.push_back({to_string(regime), caller(regime)});
    return all;
  }

  std::vector<Result> results() const {
    if (pass_ == Pass::Logsumexp) return {{reduced_.data(), of_.rows * sizeof(A)}};
    return {{result_.data(), elements_ * sizeof(T)}};
  }

  // A mask drops what stands in whole sectors at best: only causal rows and masked rows have fewer bytes to read.
  double bytes() const {
    const double all = double(elements_) * sizeof(T), read = kept_ == Kept::Causal ? all / 2 : all;
    return read * (has_grad() ? 2 : 1) + (pass_ == Pass::Logsumexp ? 0 : all) +
           (kept_ == Kept::Half ? double(elements_) : 0);
  }

  double error() const {
    Errors errors;
    for (const auto r : sample(of_.rows)) check_row(errors, r);
    return errors.worst();
  }

 private:
  bool has_grad() const { return pass_ == Pass::SoftmaxBackward || pass_ == Pass::LogSoftmaxBackward; }
  bool is_log() const { return pass_ == Pass::LogSoftmax || pass_ == Pass::LogSoftmaxBackward; }
  std::int64_t queries() const { return std::min(of_.rows, of_.classes); }
  std::int64_t offset(std::int64_t r, std::int64_t c) const {
    const auto inner = of_.inner;
    return inner == 0 ? r * of_.classes + c : (r / inner * of_.classes + c) * inner + r % inner;
  }
  bool keeps(std::int64_t r, std::int64_t c) const {
    if (kept_ == Kept::Causal) return c <= r % queries();
    return mask_.size() == 0 || mask_[kept_ == Kept::Half ? offset(r, c) : c] != 0;
  }

  void check_row(Errors& errors, std::int64_t r) const {
    Softmax<double> softmax;
    double sum = 0, size = 0;
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (!keeps(r, c)) continue;
      const double x = number(input_[offset(r, c)]);
      softmax = merge(softmax, {x, 1.0});
      if (!has_grad()) continue;
      const double grad = number(grad_[offset(r, c)]), term = pass_ == Pass::SoftmaxBackward ? grad * x : grad;
      sum += term, size += std::abs(term);
    }
    const double lse = log_sum_exp(softmax);
    if (pass_ == Pass::Logsumexp) return errors.compare(double(reduced_.host(r)), lse, 1e-5 * (1 + std::abs(lse)));
    const auto row = of_.inner == 0 ? result_.host(r * of_.classes, of_.classes) : std::vector<T>();
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      const double x = number(input_[offset(r, c)]);
      double expected = 0, scale = 0;
      if (!keeps(r, c)) {
        if (pass_ == Pass::LogSoftmax) expected = -std::numeric_limits<double>::infinity();
      } else if (has_grad()) {
        const double grad = number(grad_[offset(r, c)]), factor = is_log() ? std::exp(x) : x;
        expected = is_log() ? grad - factor * sum : factor * (grad - sum);
        scale = is_log() ? std::abs(grad) + factor * size : factor * (std::abs(grad) + size);
      } else if (pass_ == Pass::LogsumexpBackward) {
        expected = scale = std::exp(x - double(reduced_[r])) * double(row_grad_[r]);
      } else {
        expected = is_log() ? x - lse : std::exp(x - lse);
        scale = is_log() ? std::abs(x) + std::abs(lse) : expected;
      }
      const T actual = row.empty() ? result_.host(offset(r, c)) : row[std::size_t(c)];
      errors.compare(number(actual), expected,
                     1e-5 * std::abs(scale) + kRounding<T> * std::abs(expected) + (sizeof(T) == 2 ? 1e-7 : 1e-12));
    }
  }

  const Shape of_;
  const Pass pass_;
  const Kept kept_;
  const std::int64_t elements_;
  Random random_{11};
  const Repeated<T> input_;
  const Array<T> result_;
  const Repeated<A> reduced_, row_grad_;
  Repeated<T> grad_;
  Repeated<std::uint8_t> mask_;
};

template <class T>
Case rows_case(Pass pass, const Shape& of, Kept kept = Kept::All) {
  const char* passes[] = {"softmax forward",  "log_softmax forward",  "logsumexp forward",
                          "softmax backward", "log_softmax backward", "logsumexp backward"};
  const char* keeps[] = {"", " causal", " half masked", " padding"};
  const auto shape = of.inner == 0 ? std::to_string(of.rows) + "x" + std::to_string(of.classes)
                                   : "[" + std::to_string(of.rows / of.inner) + "," + std::to_string(of.classes) + "," +
                                         std::to_string(of.inner) + "]";
  return {std::string(passes[int(pass)]) + " " + dtype_name<T>() + " " + shape + keeps[int(kept)], [=] {
            const auto rows = std::make_shared<Rowwise<T>>(shrunk(of), pass, kept);
            return Job{rows->bytes(), rows->best(), [rows] { return rows->error(); }, rows->results(),
                       rows->variants()};
          }};
}

}  // namespace

std::vector<Case> softmax_cases() {
  using bf16 = __nv_bfloat16;
  std::vector<Case> cases;
  const auto add = [&](Case one) { cases.push_back(std::move(one)); };
  for (const auto pass : {Pass::Softmax, Pass::SoftmaxBackward}) {
    for (const Shape of : {Shape{8192, 2048}, {65536, 512}, {16384, 8192}, {64, 128256}}) {
      add(rows_case<bf16>(pass, of));
      if (of.classes < 10000) add(rows_case<float>(pass, of));
    }
    for (const auto kept : {Kept::Causal, Kept::Half, Kept::Padding}) {
      add(rows_case<bf16>(pass, {8 * 16 * 1024, 1024}, kept));
    }
    add(rows_case<float>(pass, {32 * 512, 1000, 512}));
    add(rows_case<bf16>(pass, {16 * 4096, 150, 4096}));
  }
  for (const auto pass : {Pass::LogSoftmax, Pass::LogSoftmaxBackward}) add(rows_case<bf16>(pass, {8192, 2048}));
  for (const auto pass : {Pass::Logsumexp, Pass::LogsumexpBackward}) {
    add(rows_case<bf16>(pass, {8192, 32000}));
    add(rows_case<float>(pass, {8192, 32000}));
    add(rows_case<float>(pass, {32 * 512, 1000, 512}));
  }
  return cases;
}

}  // namespace masked_loss::cuda::bench
