#pragma once

#include <ATen/core/Tensor.h>

namespace masked_loss {

// Asks for huge pages for a fresh tensor on the CPU, before it is first written: of a large output, page faults cost
// several times what its values do. Linux only; MASKED_LOSS_HUGE_PAGES=0 in the environment switches it off.
at::Tensor with_huge_pages(at::Tensor tensor);

}  // namespace masked_loss
