// Runs a saved TorchScript module that uses torch.ops.masked_loss, and calls no symbol of the library: linking
// MaskedLoss::masked_loss is what registers the ops.
#include <torch/script.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODULE.pt\n", argv[0]);
    return 1;
  }
  auto module = torch::jit::load(argv[1]);
  // The same numbers as in examples/torchscript.py. [B, T, C]
  auto logits = torch::arange(2 * 4 * 5, torch::kDouble).sin().view({2, 4, 5}).requires_grad_();
  const auto target = torch::arange(2 * 4).remainder(5).view({2, 4});
  const auto lengths = torch::tensor({4, 2});
  const auto loss = module.forward({logits, target, lengths}).toTensor();
  loss.backward();
  std::printf("loss %.12f  gradient's norm %.12f\n", loss.item<double>(), logits.grad().norm().item<double>());
}
