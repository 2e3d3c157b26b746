#include <masked_loss/masked_loss.h>

#include "common/cross_entropy_ops.h"
#include "common/linear_ops.h"
#include "common/masked_fill_ops.h"
#include "common/pointwise_ops.h"
#include "common/reductions_ops.h"
#include "common/softmax_ops.h"
#include "composite/masks.h"

namespace masked_loss {

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  return call<CrossEntropy>(input, target, mask, options);
}

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  return call<LossNormalizer>(target, mask, options);
}

Tensor check_targets(const Tensor& target, std::int64_t num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  return call<CheckTargets>(target, num_classes, mask, ignore_index);
}

Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& mask, const LinearCrossEntropyOptions& options) {
  return call<LinearCrossEntropy>(input, linear_weight, target, mask, options);
}

Tensor linear_log_prob(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                       const OptionalTensor& mask, const LinearLogProbOptions& options) {
  return call<LinearLogProb>(input, linear_weight, index, mask, options);
}

std::tuple<Tensor, Tensor> linear_log_prob_and_entropy(const Tensor& input, const Tensor& linear_weight,
                                                       const Tensor& index, const OptionalTensor& mask,
                                                       const LinearLogProbOptions& options) {
  return call<LinearLogProbAndEntropy>(input, linear_weight, index, mask, options);
}

Tensor linear_kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                 const Tensor& target_linear_weight, const OptionalTensor& mask, const LinearKLOptions& options) {
  return call<LinearKL>(input, linear_weight, target_input, target_linear_weight, mask, options);
}

Tensor mse_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask, const MseLossOptions& options) {
  return call<PointwiseOp<MseLoss>>(input, target, mask, options);
}

Tensor l1_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask, const L1LossOptions& options) {
  return call<PointwiseOp<L1Loss>>(input, target, mask, options);
}

Tensor smooth_l1_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                      const SmoothL1LossOptions& options) {
  return call<PointwiseOp<SmoothL1Loss>>(input, target, mask, options);
}

Tensor huber_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                  const HuberLossOptions& options) {
  return call<PointwiseOp<HuberLoss>>(input, target, mask, options);
}

Tensor binary_cross_entropy_with_logits(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                        const BinaryCrossEntropyWithLogitsOptions& options) {
  return call<PointwiseOp<BinaryCrossEntropyWithLogits>>(input, target, mask, options);
}

Tensor binary_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                            const BinaryCrossEntropyOptions& options) {
  return call<PointwiseOp<BinaryCrossEntropy>>(input, target, mask, options);
}

Tensor kl_div(const Tensor& input, const Tensor& target, const OptionalTensor& mask, const KlDivOptions& options) {
  return call<PointwiseOp<KlDiv>>(input, target, mask, options);
}

Tensor poisson_nll_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                        const PoissonNllLossOptions& options) {
  return call<PointwiseOp<PoissonNllLoss>>(input, target, mask, options);
}

Tensor gaussian_nll_loss(const Tensor& input, const Tensor& target, const Tensor& var, const OptionalTensor& mask,
                         const GaussianNllLossOptions& options) {
  return call<PointwiseOp<GaussianNllLoss>>(input, target, var, mask, options);
}

Tensor sigmoid_focal_loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                          const SigmoidFocalLossOptions& options) {
  return call<PointwiseOp<SigmoidFocalLoss>>(input, target, mask, options);
}

Tensor softmax(const Tensor& input, const OptionalTensor& mask, const SoftmaxOptions& options) {
  return call<SoftmaxOp<SoftmaxKind::Softmax>>(input, mask, options);
}

Tensor log_softmax(const Tensor& input, const OptionalTensor& mask, const SoftmaxOptions& options) {
  return call<SoftmaxOp<SoftmaxKind::LogSoftmax>>(input, mask, options);
}

Tensor logsumexp(const Tensor& input, const OptionalTensor& mask, const LogsumexpOptions& options) {
  return call<Logsumexp>(input, mask, options);
}

Tensor masked_sum(const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options) {
  return call<MaskedSum>(input, mask, options);
}

Tensor masked_mean(const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options) {
  return call<MaskedMean>(input, mask, options);
}

Tensor masked_var(const Tensor& input, const OptionalTensor& mask, const VarianceOptions& options) {
  return call<MaskedVar>(input, mask, options);
}

Tensor masked_std(const Tensor& input, const OptionalTensor& mask, const VarianceOptions& options) {
  return call<MaskedStd>(input, mask, options);
}

Tensor masked_whiten(const Tensor& input, const OptionalTensor& mask, const WhitenOptions& options) {
  return call<MaskedWhiten>(input, mask, options);
}

Tensor masked_fill(const Tensor& input, const Tensor& mask, const at::Scalar& value) {
  return call<MaskedFill<at::Scalar>>(input, mask, value);
}

Tensor masked_fill(const Tensor& input, const Tensor& mask, const Tensor& value) {
  return call<MaskedFill<Tensor>>(input, mask, value);
}

void masked_fill_(const Tensor& input, const Tensor& mask, const at::Scalar& value) {
  call<MaskedFill_<at::Scalar>>(const_cast<Tensor&>(input), mask, value);
}

void masked_fill_(const Tensor& input, const Tensor& mask, const Tensor& value) {
  call<MaskedFill_<Tensor>>(const_cast<Tensor&>(input), mask, value);
}

Tensor sequence_mask(const Tensor& lengths, std::int64_t maxlen, PaddingSide padding_side) {
  return call<SequenceMask>(lengths, maxlen, padding_side == PaddingSide::Right ? "right" : "left");
}

Tensor causal_mask(std::int64_t query_len, std::optional<std::int64_t> key_len, std::optional<at::Device> device) {
  return call<CausalMask>(query_len, key_len ? std::optional<c10::SymInt>(*key_len) : std::nullopt, device);
}

Tensor mask_from_ids(const Tensor& tokens, at::IntArrayRef ids) { return call<MaskFromIds>(tokens, ids); }

}  // namespace masked_loss
