#pragma once

#include <cuda_runtime_api.h>

#include "common/linear.h"

namespace masked_loss::cuda {

template <class A>
void run_linear(const LinearWork<A>& work, LinearMode mode, int multiprocessors, cudaStream_t stream);

// Loss, entropy and what is saved of rows from their states.
template <class A>
void conclude_linear(const LinearConclusion<A>& work, std::int64_t rows, cudaStream_t stream);

template <class A>
void run_divergence(const DivergenceWork<A>& work, DivergenceKind kind, int multiprocessors, cudaStream_t stream);

// softcap (0: none) and temperature of n logits, in place.
template <class A>
void soften(A* logits, std::int64_t n, A softcap, A temperature, int multiprocessors, cudaStream_t stream);

// to = gradient times the derivative of what was softened to `logits`; a zero stays +0. `to` may be the gradient.
template <class T, class A>
void harden(T* to, const A* gradient, const A* logits, std::int64_t n, A softcap, A temperature, int multiprocessors,
            cudaStream_t stream);

}  // namespace masked_loss::cuda
