// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/softmax_kernel.h"

#include <cmath>

#include "cpu/blocks.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

using Pass = SoftmaxPass;

constexpr std::int64_t kBlock = 2048;  // classes of a row that are visited together

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

constexpr bool is_forward(SoftmaxPass pass) {
  return pass == Pass::Softmax || pass == Pass::LogSoftmax || pass == Pass::Logsumexp;
}

template <class A>
constexpr A masked_value(SoftmaxPass pass) {
  return pass == Pass::LogSoftmax || pass == Pass::Logsumexp ? -kInfinity<A> : A(0);
}

// Of a sum of exponentials that is NaN: an infinite element makes it so, though its log-sum-exp is infinite too.
template <class A, class At>
A log_sum_exp_of(Softmax<A> softmax, std::int64_t n, const At& at) {
  if (softmax.max != kInfinity<A>) return log_sum_exp(softmax);
  for (std::int64_t i = 0; i < n; ++i) {
    if (std::isnan(at(i))) return std::numeric_limits<A>::quiet_NaN();
  }
  return kInfinity<A>;
}

// What the gradient of a row sums: result * grad of softmax, grad of log_softmax.
template <SoftmaxPass pass, class A>
Vectorized<A> summed(Vectorized<A> result, Vectorized<A> grad) {
  return pass == Pass::SoftmaxBackward ? result * grad : grad;
}

template <SoftmaxPass pass, class A>
Vectorized<A> gradient(Vectorized<A> result, Vectorized<A> grad, Vectorized<A> sum) {
  return pass == Pass::SoftmaxBackward ? result * (grad - sum) : grad - exp_of_negative(result) * sum;
}

// The first and the last true byte of [begin, end), as a range.
struct Range {
  std::int64_t begin, end;

  void trim(const std::uint8_t* keep) {
    const auto word = [&](std::int64_t i) {
      std::uint64_t bytes;
      std::memcpy(&bytes, keep + i, 8);
      return bytes;
    };
    while (end - begin >= 8 && word(end - 8) == 0) end -= 8;
    while (end > begin && !keep[end - 1]) --end;
    while (end - begin >= 8 && word(begin) == 0) begin += 8;
    while (begin < end && !keep[begin]) ++begin;
  }
};

// The memory that rows are computed in. Lines whose elements lie apart are gathered first.
template <class T, class A>
struct RowScratch {
  A* row;                    // [classes]
  Softmax<A>* blocks;        // of each block
  T *input, *grad, *result;  // [classes], or null where they lie beside one another
  std::uint8_t* mask;
  std::int64_t size = 0;  // bytes

  RowScratch(const SoftmaxWork<T, A>& work, char* data) {
    const auto take = [&]<class P>(P*& pointer, std::int64_t count) {
      pointer = count == 0 ? nullptr : reinterpret_cast<P*>(data + size);
      size += (count * static_cast<std::int64_t>(sizeof(P)) + 63) / 64 * 64;
    };
    const auto apart = [&](const void* of, std::int64_t stride) {
      return of == nullptr || stride == 1 ? 0 : work.classes;
    };
    take(row, work.classes);
    take(blocks, (work.classes + kBlock - 1) / kBlock);
    take(input, apart(work.input, work.input_stride));
    take(grad, apart(work.grad, work.grad_stride));
    take(result, apart(work.result, work.result_stride));
    take(mask, work.mask_stride == 0 ? 0 : apart(work.mask, work.mask_stride));
  }
};

// One row at a time. What lies before the first and after the last kept element is only written.
template <class T, class A, SoftmaxPass pass>
class RowKernel {
 public:
  RowKernel(const SoftmaxWork<T, A>& work, char* scratch)
      : work_(work), scratch_(work, scratch), past_cache_(past_cache(work) && scratch_.result == nullptr) {}

  void operator()(std::int64_t r) {
    const auto [input, grad, result, mask] = work_.rows.offsets(r);
    r_ = r;
    range_ = {0, work_.causal_end(r)};
    keep_ = nullptr;
    if (work_.mask != nullptr) restrict_to(work_.mask + mask);
    input_ = gathered(work_.input + input, work_.input_stride, scratch_.input);
    if constexpr (pass == Pass::SoftmaxBackward || pass == Pass::LogSoftmaxBackward) {
      grad_ = gathered(work_.grad + grad, work_.grad_stride, scratch_.grad);
    }
    T* to = work_.result + result;
    result_ = scratch_.result == nullptr ? to : scratch_.result;
    if (range_.begin == range_.end) {
      if constexpr (pass == Pass::Logsumexp) {
        work_.reduced[r] = -kInfinity<A>;
      } else {
        write({0, 0}, row_values());
      }
    } else if constexpr (is_forward(pass)) {
      forward();
    } else {
      backward();
    }
    for (std::int64_t c = 0; scratch_.result != nullptr && c < work_.classes; ++c) {
      to[c * work_.result_stride] = result_[c];
    }
  }

 private:
  using V = Vectorized<A>;
  static constexpr bool converts = !std::is_same_v<T, A>;
  static constexpr std::int64_t kLine = 64 / sizeof(T);

  void restrict_to(const std::uint8_t* mask) {
    if (work_.mask_stride == 0) {
      if (!*mask) range_.end = 0;
      return;
    }
    for (std::int64_t c = 0; scratch_.mask != nullptr && c < range_.end; ++c) {
      scratch_.mask[c] = mask[c * work_.mask_stride];
    }
    keep_ = scratch_.mask == nullptr ? mask : scratch_.mask;
    range_.trim(keep_);
  }

  const T* gathered(const T* line, std::int64_t stride, T* beside) const {
    if (beside == nullptr) return line;
    for (auto c = range_.begin; c < range_.end; ++c) beside[c] = line[c * stride];
    return beside;
  }

  // What is read after a block: the rest of the row, or the next one.
  Ahead ahead(const T* line, std::int64_t i, std::int64_t n) const {
    return {line + (i + n < range_.end ? i + n : work_.classes + range_.begin), n};
  }

  const std::uint8_t* keep_at(std::int64_t i) const { return keep_ == nullptr ? nullptr : keep_ + i; }

  // Calls visit(begin, count, number) for the kept part of each block.
  template <class Visit>
  void for_blocks(Range range, const Visit& visit) const {
    for (auto i = range.begin; i < range.end;) {
      const auto b = i / kBlock, end = std::min(range.end, (b + 1) * kBlock);
      visit(i, end - i, b);
      i = end;
    }
  }

  // The range in whole cache lines, so that each is written by one way; what is added to it in `row` is `value`.
  Range padded(A value) const {
    const Range lines{range_.begin / kLine * kLine, std::min(work_.classes, (range_.end + kLine - 1) / kLine * kLine)};
    std::fill(scratch_.row + lines.begin, scratch_.row + range_.begin, value);
    std::fill(scratch_.row + range_.end, scratch_.row + lines.end, value);
    return lines;
  }

  // Writes the range, of each block what value_of(block)(position, lanes) gives, and what is masked around it.
  template <class ValueOf>
  void write(Range range, const ValueOf& value_of) const {
    const auto as = [&](auto past) {
      constexpr bool past_cache = decltype(past)::value;
      fill<past_cache>(result_, range.begin, T(masked_value<A>(pass)));
      for_blocks(range, [&](std::int64_t i, std::int64_t n, std::int64_t b) {
        const auto value = value_of(b);
        store_vectors<past_cache, A>(result_ + i, n,
                                     [&](std::int64_t k, std::int64_t lanes) { return value(i + k, lanes); });
      });
      fill<past_cache>(result_ + range.end, work_.classes - range.end, T(masked_value<A>(pass)));
    };
    past_cache_ ? as(std::true_type()) : as(std::false_type());
  }

  void forward() {
    const bool whole = range_.begin == 0 && range_.end == work_.classes;
    const bool copies = pass == Pass::LogSoftmax && !whole;  // to have something around it
    Softmax<A> softmax;
    const A* elements = input_as_is();
    if (converts || keep_ != nullptr || copies) elements = scratch_.row;
    for_blocks(range_, [&](std::int64_t i, std::int64_t n, std::int64_t b) {
      A* kept = scratch_.row + i;
      const A* block = load_block(input_ + i, keep_at(i), n, kept);
      if (copies && block != kept) std::copy(block, block + n, kept);
      const A max = max_of(block, n);
      scratch_.blocks[b] = {max, exp_sum<pass == Pass::Softmax>(block, kept, n, max, ahead(input_, i, n))};
      softmax = merge(softmax, scratch_.blocks[b]);
    });
    if constexpr (pass == Pass::Logsumexp) {
      const auto at = [&](std::int64_t i) { return keep_ == nullptr || keep_[i] ? A(input_[i]) : A(0); };
      work_.reduced[r_] = log_sum_exp_of(softmax, range_.end, at);
    } else if constexpr (pass == Pass::Softmax) {
      // NaN belongs to what is kept alone.
      const auto range = std::isfinite(1 / softmax.sum) ? padded(0) : range_;
      write(range, [&](std::int64_t b) {
        const V scale(std::exp(scratch_.blocks[b].max - softmax.max) / softmax.sum);
        return [this, scale](std::int64_t i, std::int64_t lanes) {
          return or_zero(keep_at(i), load(scratch_.row + i, lanes) * scale, lanes);
        };
      });
    } else {
      const A log_sum = std::log(softmax.sum);
      const auto range = whole || !std::isfinite(softmax.max + log_sum) ? range_ : padded(-kInfinity<A>);
      const V max(softmax.max), sum(log_sum), masked(-kInfinity<A>);
      write(range, [&](std::int64_t) {
        return [&](std::int64_t i, std::int64_t lanes) {
          const V v = load(elements + i, lanes) - max - sum;
          return keep_ == nullptr ? v : select(keep_ + i, v, masked, lanes);
        };
      });
    }
  }

  // Of write: what is in `row`.
  auto row_values() const {
    return [this](std::int64_t) {
      return [this](std::int64_t i, std::int64_t lanes) { return load(scratch_.row + i, lanes); };
    };
  }

  const A* input_as_is() const {
    if constexpr (converts) {
      return nullptr;
    } else {
      return input_;
    }
  }

  static V load(const A* from, std::int64_t lanes) {
    return lanes == V::size() ? V::loadu(from) : V::loadu(from, lanes);
  }

  void backward() {
    A input_stage[converts ? kBlock : 1], grad_stage[converts ? kBlock : 1];
    A sum = 0;
    if constexpr (pass != Pass::LogsumexpBackward) {
      for_blocks(range_, [&](std::int64_t i, std::int64_t n, std::int64_t) {
        const A* grad = load_block(grad_ + i, nullptr, n, grad_stage);
        const A* result = pass == Pass::SoftmaxBackward ? load_block(input_ + i, nullptr, n, input_stage) : grad;
        const auto next_grad = ahead(grad_, i, n),
                   next_input = pass == Pass::SoftmaxBackward ? ahead(input_, i, n) : Ahead();
        V sums[2] = {V(0), V(0)};
        for (std::int64_t k = 0, s = 0; k < n; k += V::size(), s ^= 1) {
          next_grad.fetch_at(k, V::size());
          next_input.fetch_at(k, V::size());
          const auto lanes = std::min<std::int64_t>(V::size(), n - k);
          const V term = or_zero(keep_at(i + k), summed<pass>(load(result + k, lanes), load(grad + k, lanes)), lanes);
          sums[s] = sums[s] + (lanes == V::size() ? term : V::set(V(0), term, lanes));
        }
        sum += sum_lanes(sums[0] + sums[1]);
      });
    }
    const V total(pass == Pass::LogsumexpBackward ? work_.row_grad[r_] : sum);
    const V lse(pass == Pass::LogsumexpBackward ? work_.reduced[r_] : A(0));
    for_blocks(range_, [&](std::int64_t i, std::int64_t n, std::int64_t) {
      const A* input = load_block(input_ + i, nullptr, n, input_stage);
      const A* grad = pass == Pass::LogsumexpBackward ? input : load_block(grad_ + i, nullptr, n, grad_stage);
      const auto next = pass == Pass::SoftmaxBackward ? Ahead() : ahead(input_, i, n);
      for (std::int64_t k = 0; k < n; k += V::size()) {
        next.fetch_at(k, V::size());
        const auto lanes = std::min<std::int64_t>(V::size(), n - k);
        const V x = load(input + k, lanes);
        const V v = pass == Pass::LogsumexpBackward ? exp_of_negative(x - lse) * total
                                                    : gradient<pass>(x, load(grad + k, lanes), total);
        or_zero(keep_at(i + k), v, lanes).store(scratch_.row + i + k, lanes);
      }
    });
    write(padded(0), row_values());
  }

  const SoftmaxWork<T, A>& work_;
  const RowScratch<T, A> scratch_;
  const bool past_cache_;
  std::int64_t r_ = 0;
  Range range_{};
  const std::uint8_t* keep_ = nullptr;  // null: the whole range
  const T *input_ = nullptr, *grad_ = nullptr;
  T* result_ = nullptr;
};

// Rows beside one another in vectors, as lanes, for classes that are apart in memory.
template <class T, class A, SoftmaxPass pass>
class TileKernel {
 public:
  TileKernel(const SoftmaxWork<T, A>& work, char* scratch)
      : work_(work),
        lanes_(lanes(work)),
        past_cache_(past_cache(work)),
        input_(reinterpret_cast<A*>(scratch)),
        grad_(input_ + work.classes * lanes_) {
    const auto last = work.rows.dims - 1;
    inner_ = work.rows.sizes[last];
    for (int k = 0; k < 4; ++k) stride_[k] = work.rows.strides[k][last];
  }

  // As many as let a tile stay in the L2 cache, but fewer where there would not be tiles for many threads.
  static std::int64_t lanes(const SoftmaxWork<T, A>& work) {
    const auto most = kTile / std::max<std::int64_t>(1, work.classes * tiles);
    auto lanes = std::clamp<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(most)), kFewLanes, kLanes);
    while (lanes > kFewLanes && lanes * kTiles > work.rows.count) lanes /= 2;
    return lanes;
  }

  static std::int64_t scratch_size(const SoftmaxWork<T, A>& work) {
    return tiles * work.classes * lanes(work) * static_cast<std::int64_t>(sizeof(A));
  }

  void operator()(std::int64_t begin, std::int64_t end) {
    for (auto r = begin; r < end; r += lanes_) run(r, std::min(lanes_, end - r));
  }

 private:
  using V = Vectorized<A>;
  static constexpr std::int64_t kTile = 1 << 17;  // elements
  static constexpr std::int64_t kLanes = 512, kFewLanes = 32, kTiles = 16;
  static constexpr bool has_grad = pass == Pass::SoftmaxBackward || pass == Pass::LogSoftmaxBackward;
  static constexpr int tiles = has_grad ? 2 : 1;

  // Lanes whose rows are one step apart.
  struct Part {
    std::int64_t lane, count;
    std::array<std::int64_t, 4> offsets;
  };

  void run(std::int64_t first, std::int64_t count) {
    first_ = first, count_ = count, parts_ = 0, kept_class_ = -1;
    for (std::int64_t lane = 0; lane < count; lane += part_[parts_++].count) {
      const auto together = std::min(count - lane, inner_ - (first + lane) % inner_);
      part_[parts_] = {lane, together, work_.rows.offsets(first + lane)};
    }
    is_forward(pass) ? forward() : backward();
  }

  template <class Visit>
  void for_lanes(const Visit& visit) const {
    for (std::int64_t w = 0; w < count_; w += V::size()) visit(w, std::min<std::int64_t>(V::size(), count_ - w));
  }

  // The class of every lane, as A.
  void load(const T* data, std::int64_t class_stride, int operand, std::int64_t c, A* to) const {
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const T* x = data + part.offsets[operand] + c * class_stride;
      if (stride_[operand] == 1 || part.count == 1) {
        for_vectors<A>(x, part.count, [&](V v, std::int64_t w, std::int64_t n) { v.store(to + part.lane + w, n); });
      } else {
        for (std::int64_t w = 0; w < part.count; ++w) to[part.lane + w] = static_cast<A>(x[w * stride_[operand]]);
      }
    }
  }

  // The masks of a class, or null.
  const std::uint8_t* keep(std::int64_t c) {
    if (work_.mask == nullptr) return nullptr;
    if (parts_ == 1 && stride_[3] == 1) return work_.mask + part_[0].offsets[3] + c * work_.mask_stride;
    if (kept_class_ == c || (kept_class_ >= 0 && work_.mask_stride == 0)) return keep_;
    kept_class_ = c;
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const std::uint8_t* mask = work_.mask + part.offsets[3] + c * work_.mask_stride;
      for (std::int64_t w = 0; w < part.count; ++w) keep_[part.lane + w] = mask[w * stride_[3]];
    }
    return keep_;
  }

  static V kept(const std::uint8_t* keep, std::int64_t w, V v, V masked, std::int64_t n) {
    return keep == nullptr ? v : select(keep + w, v, masked, n);
  }

  void store(std::int64_t c, const A* from) const {
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      T* out = work_.result + part.offsets[2] + c * work_.result_stride;
      const auto value = [&](std::int64_t w, std::int64_t n) { return V::loadu(from + part.lane + w, n); };
      past_cache_ ? store_vectors<true, A>(out, part.count, value) : store_vectors<false, A>(out, part.count, value);
    }
  }

  void forward() {
    const V lowest(std::numeric_limits<A>::lowest()), masked(-kInfinity<A>);
    std::fill(max_, max_ + lanes_, std::numeric_limits<A>::lowest());
    std::fill(sum_, sum_ + lanes_, A(0));
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* x = input_ + c * lanes_;
      load(work_.input, work_.input_stride, 0, c, x);
      const std::uint8_t* mask = keep(c);
      for_lanes([&](std::int64_t w, std::int64_t n) {
        const V v = kept(mask, w, V::loadu(x + w, n), masked, n);
        v.store(x + w, n);
        larger(v, V::loadu(max_ + w)).store(max_ + w);
      });
    }
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* x = input_ + c * lanes_;
      for_lanes([&](std::int64_t w, std::int64_t n) {
        const V e = exp_of_negative(V::loadu(x + w, n) - V::loadu(max_ + w));
        if constexpr (pass == Pass::Softmax) e.store(x + w, n);
        (V::loadu(sum_ + w) + e).store(sum_ + w);
      });
    }
    if constexpr (pass == Pass::Logsumexp) {
      for (std::int64_t w = 0; w < count_; ++w) {
        const auto at = [&](std::int64_t c) { return input_[c * lanes_ + w]; };
        work_.reduced[first_ + w] = log_sum_exp_of(Softmax<A>{max_[w], sum_[w]}, work_.classes, at);
      }
      return;
    }
    for_lanes([&](std::int64_t w, std::int64_t) {
      const V sum = V::loadu(sum_ + w);
      (pass == Pass::Softmax ? V(1) / sum : sum.log()).store(sum_ + w);
    });
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* x = input_ + c * lanes_;
      const std::uint8_t* mask = keep(c);
      for_lanes([&](std::int64_t w, std::int64_t n) {
        const V v = V::loadu(x + w, n), sum = V::loadu(sum_ + w);
        const V result = pass == Pass::Softmax ? v * sum : v - V::loadu(max_ + w) - sum;
        kept(mask, w, result, V(masked_value<A>(pass)), n).store(x + w, n);
      });
      store(c, x);
    }
  }

  void backward() {
    if constexpr (has_grad) {
      std::fill(sum_, sum_ + lanes_, A(0));
      for (std::int64_t c = 0; c < work_.classes; ++c) {
        A *x = input_ + c * lanes_, *grad = grad_ + c * lanes_;
        load(work_.input, work_.input_stride, 0, c, x);
        load(work_.grad, work_.grad_stride, 1, c, grad);
        const std::uint8_t* mask = keep(c);
        for_lanes([&](std::int64_t w, std::int64_t n) {
          const V term = summed<pass>(V::loadu(x + w, n), V::loadu(grad + w, n));
          (V::loadu(sum_ + w) + kept(mask, w, term, V(0), n)).store(sum_ + w);
        });
      }
    }
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* x = input_ + c * lanes_;
      if constexpr (!has_grad) load(work_.input, work_.input_stride, 0, c, x);
      const std::uint8_t* mask = keep(c);
      for_lanes([&](std::int64_t w, std::int64_t n) {
        const V v = V::loadu(x + w, n);
        V result;
        if constexpr (has_grad) {
          result = gradient<pass>(v, V::loadu(grad_ + c * lanes_ + w, n), V::loadu(sum_ + w));
        } else {
          const auto r = first_ + w;
          result = exp_of_negative(v - V::loadu(work_.reduced + r, n)) * V::loadu(work_.row_grad + r, n);
        }
        kept(mask, w, result, V(0), n).store(x + w, n);
      });
      store(c, x);
    }
  }

  const SoftmaxWork<T, A>& work_;
  const std::int64_t lanes_;
  const bool past_cache_;
  A *input_, *grad_;        // [classes, lanes]
  std::int64_t inner_;      // rows that are one step apart
  std::int64_t stride_[4];  // between lanes of a part
  std::int64_t first_ = 0, count_ = 0, kept_class_ = -1;
  int parts_ = 0;
  Part part_[kLanes];
  std::uint8_t keep_[kLanes];
  A max_[kLanes], sum_[kLanes];
};

// Whether lanes are of use: classes that lie apart, of rows that lie beside one another.
template <class T, class A>
bool by_tiles(const SoftmaxWork<T, A>& work) {
  const auto last = work.rows.dims - 1;
  const auto beside = [&](int operand, const void* data) {
    return data == nullptr || work.rows.strides[operand][last] == 1;
  };
  return work.queries == 0 && work.input_stride != 1 && last >= 0 && beside(0, work.input) && beside(2, work.result);
}

// Calls run(constant) with the pass as a constant.
template <class Run>
auto with_pass(SoftmaxPass pass, const Run& run) {
  switch (pass) {
    case Pass::Softmax: return run(std::integral_constant<Pass, Pass::Softmax>());
    case Pass::LogSoftmax: return run(std::integral_constant<Pass, Pass::LogSoftmax>());
    case Pass::Logsumexp: return run(std::integral_constant<Pass, Pass::Logsumexp>());
    case Pass::SoftmaxBackward: return run(std::integral_constant<Pass, Pass::SoftmaxBackward>());
    case Pass::LogSoftmaxBackward: return run(std::integral_constant<Pass, Pass::LogSoftmaxBackward>());
    default: return run(std::integral_constant<Pass, Pass::LogsumexpBackward>());
  }
}

template <class T, class A>
void run(const SoftmaxWork<T, A>& work, SoftmaxPass pass, std::int64_t begin, std::int64_t end, char* scratch) {
  with_pass(pass, [&](auto p) {
    if (by_tiles(work)) {
      TileKernel<T, A, p()>(work, scratch)(begin, end);
    } else {
      RowKernel<T, A, p()> kernel(work, scratch);
      for (auto r = begin; r < end; ++r) kernel(r);
    }
    finish_stores();
  });
}

template <class T, class A>
std::int64_t scratch_size(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  return with_pass(pass, [&](auto p) {
    return by_tiles(work) ? TileKernel<T, A, p()>::scratch_size(work) : RowScratch<T, A>(work, nullptr).size;
  });
}

template <class T, class A>
std::int64_t rows_at_once(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  return with_pass(pass, [&](auto p) { return by_tiles(work) ? TileKernel<T, A, p()>::lanes(work) : 1; });
}

template <class T, class A>
constexpr SoftmaxKernel<T, A> kernel{run<T, A>, scratch_size<T, A>, rows_at_once<T, A>};

}  // namespace

const SoftmaxKernels& softmax_kernels() {
  static constexpr SoftmaxKernels kernels{kernel<float, float>, kernel<double, double>, kernel<at::BFloat16, float>,
                                          kernel<at::Half, float>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
