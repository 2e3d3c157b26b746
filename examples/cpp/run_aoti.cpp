// Runs a package of AOTInductor's that uses torch.ops.masked_loss, without Python and without calling a symbol of the
// library: linking MaskedLoss::masked_loss is what registers the ops.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s PACKAGE.pt2\n", argv[0]);
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  // The same numbers as in examples/aoti.py. [B, T, C]
  const std::int64_t size = 6, time = 7, classes = 5;
  const auto logits = torch::arange(size * time * classes, torch::kFloat).sin().view({size, time, classes});
  const auto target = torch::arange(size * time).remainder(classes).view({size, time});
  const auto lengths = torch::arange(size).remainder(time) + 1;
  const auto results = model.run({logits, target, lengths});
  std::printf("loss %.6f  count %.0f  logits %.4f\n", results[0].item<double>(), results[1].item<double>(),
              results[2].norm().item<double>());
}
