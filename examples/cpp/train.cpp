// Trains a small model in C++ on a padded batch of sequences of different lengths.
#include <masked_loss/masked_loss.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

constexpr std::int64_t kTokens = 23, kWidth = 32, kBatch = 16, kLength = 20, kSteps = 200;

// The next token follows from the current one; a model that has learnt the rule has a loss near 0.
torch::Tensor next_token(const torch::Tensor& token) { return (3 * token + 2).remainder(kTokens); }

struct ModelImpl : torch::nn::Module {
  torch::nn::Embedding embed = register_module("embed", torch::nn::Embedding(kTokens, kWidth));
  torch::nn::Linear hidden = register_module("hidden", torch::nn::Linear(kWidth, kWidth));
  torch::nn::Linear logits = register_module("logits", torch::nn::Linear(kWidth, kTokens));

  torch::Tensor forward(const torch::Tensor& tokens) { return logits(torch::relu(hidden(embed(tokens)))); }
};
TORCH_MODULE(Model);

}  // namespace

int main() {
  torch::manual_seed(0);
  Model model;
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(1e-2));

  for (std::int64_t step = 0; step <= kSteps; ++step) {
    const auto tokens = torch::randint(kTokens, {kBatch, kLength});
    const auto lengths = torch::randint(1, kLength + 1, {kBatch});
    const auto mask = masked_loss::sequence_mask(lengths, kLength);
    // What pads the targets is no class at all: it is never read.
    const auto target = masked_loss::masked_fill(next_token(tokens), mask.logical_not(), -1);

    const auto logits = model->forward(tokens);  // [B, T, C]
    const auto loss = masked_loss::cross_entropy(logits, target, mask, {.dim = -1});
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();

    if (step % 50 == 0) {
      const auto kept = torch::nn::functional::cross_entropy(logits.index({mask}), target.index({mask}));
      std::printf("step %3d  loss %.6f  on the kept positions alone %.6f\n", static_cast<int>(step),
                  loss.item<double>(), kept.item<double>());
    }
  }
}
