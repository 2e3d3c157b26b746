#pragma once

// Only for kernel files, as row_program.h: a row kernel from row programs.
#include "cpu/row_blocks.h"
#include "cpu/row_kernel.h"
#include "cpu/row_tiles.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

// `Programs` is a family: with(work, mode, begin, body) calls body(program), a program that knows of a plan what begins
// with the row at `begin`; Programs::operands(work) are RowOperands.
template <class Programs>
class RowEngine {
 public:
  using Work = typename Programs::Work;
  using Mode = typename Programs::Mode;

  static constexpr RowKernel<Work, Mode> kernel() { return {sizes, run, step}; }

 private:
  using Sizes = typename RowKernel<Work, Mode>::Sizes;
  using Step = typename RowKernel<Work, Mode>::Step;

  // Up to so many classes, rows are lanes even where their classes are contiguous: fewer where more is transposed than
  // the input, and where those are masks of their own, byte by byte.
  template <class Program>
  static std::int64_t most_transposed(const RowOperands<typename Program::T>& operands) {
    if (operands.has_own_masks() && (operands.causal || operands.mask.stride != 0)) return kSmallClasses / 4;
    return Program::kVisitsInput && operands.second.data == nullptr ? kSmallClasses : kSmallClasses / 2;
  }

  // Calls body(program, operands, whether rows are visited in blocks).
  template <class Body>
  static auto with(const Work& work, Mode mode, std::int64_t begin, const Body& body) {
    return Programs::with(work, mode, begin, [&]<class Program>(const Program& program) {
      const auto operands = Programs::operands(work);
      return body(program, operands, operands.classes > most_transposed<Program>(operands) && operands.contiguous());
    });
  }

  static std::int64_t in_lines(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

  template <class Program>
  static std::int64_t references_size(const RowOperands<typename Program::T>& operands) {
    return in_lines(RowBlocks<Program>::blocks(operands) * sizeof(typename Program::A));
  }

  static void run(const Work& work, Mode mode, std::int64_t begin, std::int64_t end, char* scratch) {
    with(work, mode, begin, [&]<class Program>(const Program& program, const auto& operands, bool blocks) {
      using A = typename Program::A;
      if (!blocks) {
        RowTiles<Program>(program, operands, scratch)(begin, end);
      } else {
        using Row = RowBlocks<Program>;
        auto* references = reinterpret_cast<A*>(scratch);
        const bool keeps_row = Row::keeps_row(operands);
        auto* kept = keeps_row ? reinterpret_cast<A*>(scratch + references_size<Program>(operands)) : nullptr;
        const auto last = Row::blocks(operands);
        Row row(program, operands, kept);
        for (auto p = begin; p < end; ++p) {
          row(p);
          typename Row::State state;
          typename Row::Terms terms;
          row.visit(0, last, state, references);
          row.conclude(state, terms);
          row.write(0, last, state, terms, references);
        }
      }
      finish_stores();
    });
  }

  // What is known of a row between the steps: its terms, the state of each part, and the references of its blocks.
  template <class Program>
  struct Memory {
    using Row = RowBlocks<Program>;
    typename Row::Terms* terms;
    typename Row::State* states;
    typename Program::A* references;
    std::int64_t size;

    Memory(const RowOperands<typename Program::T>& operands, char* data) {
      const auto blocks = Row::blocks(operands), parts = (blocks + kPart - 1) / kPart;
      const auto states_at = in_lines(sizeof(*terms)), references_at = states_at + in_lines(parts * sizeof(*states));
      terms = reinterpret_cast<typename Row::Terms*>(data);
      states = reinterpret_cast<typename Row::State*>(data + states_at);
      references = reinterpret_cast<typename Program::A*>(data + references_at);
      size = references_at + references_size<Program>(operands);
    }
  };

  static Sizes sizes(const Work& work, Mode mode) {
    return with(work, mode, 0, []<class Program>(const Program&, const auto& operands, bool blocks) -> Sizes {
      using Row = RowBlocks<Program>;
      if (!blocks) return {RowTiles<Program>::lanes(operands), RowTiles<Program>::scratch_size(operands), 1, 0};
      const auto kept = Row::keeps_row(operands) ? operands.classes * std::int64_t(sizeof(typename Program::A)) : 0;
      return {1, references_size<Program>(operands) + kept, (Row::blocks(operands) + kPart - 1) / kPart,
              Memory<Program>(operands, nullptr).size};
    });
  }

  static void step(const Work& work, Mode mode, Step step, std::int64_t row, std::int64_t part, char* memory) {
    with(work, mode, 0, [&]<class Program>(const Program& program, const auto& operands, bool) {
      RowBlocks<Program> blocks(program, operands, nullptr);
      blocks(row);
      const Memory<Program> known(operands, memory);
      const auto begin = part * kPart, last = RowBlocks<Program>::blocks(operands), end = std::min(last, begin + kPart);
      auto& state = known.states[0];
      switch (step) {
        case Step::Visit: return blocks.visit(begin, end, known.states[part], known.references);
        case Step::Conclude:
          for (std::int64_t other = 1; other * kPart < last; ++other) program.merge(state, known.states[other]);
          return blocks.conclude(state, *known.terms);
        case Step::Write: blocks.write(begin, end, state, *known.terms, known.references); return finish_stores();
      }
    });
  }
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
