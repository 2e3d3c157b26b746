#include <torch/library.h>

#include "common/cross_entropy_ops.h"
#include "common/linear_ops.h"
#include "common/masked_fill_ops.h"
#include "common/pointwise_ops.h"
#include "common/reductions_ops.h"
#include "common/softmax_ops.h"

// Every op of the library. `int reduction` is 0 none, 1 mean, 2 sum, 3 sequence_mean, 4 batchmean, and stands first
// among the options, because sharding caches tell calls apart by the arguments from the first int on.
TORCH_LIBRARY(masked_loss, m) {
  using namespace masked_loss;
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto def = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  const std::string loss_arguments = std::string("Tensor input, Tensor target, Tensor? mask=None, ");
  const std::string cross_entropy = loss_arguments + kCrossEntropyArguments;

  def("cross_entropy(" + cross_entropy + ") -> Tensor");
  def("_cross_entropy_forward(" + cross_entropy + ") -> (Tensor, Tensor)");
  def("_cross_entropy_forward_grad(" + cross_entropy + ") -> (Tensor, Tensor)");
  def("_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor softmax, Tensor? mask=None, " +
      std::string(kCrossEntropyArguments) + ") -> Tensor");
  def("loss_normalizer(Tensor target, Tensor? mask=None, " + std::string(kLossNormalizerArguments) + ") -> Tensor");
  def("check_targets(Tensor target, SymInt num_classes, Tensor? mask=None, int[1] ignore_index=-100) -> Tensor");

  const std::string linear_target = "Tensor input, Tensor linear_weight, Tensor target, Tensor? mask=None, ";
  const std::string linear_index = "Tensor input, Tensor linear_weight, Tensor index, Tensor? mask=None, ";
  const std::string linear_inner = linear_target + linear_arguments();
  def("linear_cross_entropy(" + linear_target + kLinearCrossEntropyArguments + ") -> Tensor");
  def("linear_log_prob(" + linear_index + kLinearLogProbArguments + ") -> Tensor");
  def("linear_log_prob_and_entropy(" + linear_index + kLinearLogProbArguments + ") -> (Tensor, Tensor)");
  def("_linear_forward_grad(" + linear_inner + ") -> (Tensor, Tensor, Tensor, Tensor)");
  def("_linear_rows_forward(" + linear_inner + ") -> (Tensor, Tensor, Tensor)");
  def("_linear_rows_backward(Tensor grad, Tensor? entropy_grad, Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor states, Tensor? mask=None, " +
      linear_arguments() + ") -> (Tensor, Tensor, Tensor)");

  const std::string linear_kl =
      "Tensor input, Tensor linear_weight, Tensor target_input, Tensor target_linear_weight, "
      "Tensor? mask=None, ";
  def("linear_kl(" + linear_kl + kLinearKLArguments + ") -> Tensor");
  def("_linear_kl_gradients(" + linear_kl + "Tensor? grad=None, " + kLinearKLArguments +
      ", int wanted=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // An integer mask that holds something else than 0 and 1 is an error in the name of an op, where values are read.
  def("_check_mask(Tensor mask, str op, str name) -> ()");

  // Multiplies a gradient that was made in the forward pass by the upstream one; zeros stay +0.0 whatever it is.
  def("_scale_gradient_(Tensor(a!) gradient, Tensor grad) -> ()");

  for_each_pointwise([&]<class Loss>() {
    def(std::string(Loss::name) + "(Tensor input, Tensor target, " + (kHasVar<Loss> ? "Tensor var, " : "") +
        "Tensor? mask=None, " + Loss::arguments +
        "Tensor? sample_weight=None, Tensor? normalizer=None, ScalarType? dtype=None) -> Tensor");
  });
  const std::string pointwise =
      std::string("Tensor input, Tensor target, Tensor? other=None, Tensor? mask=None, ") + kPointwiseArguments;
  def("_pointwise_forward(" + pointwise + ") -> Tensor");
  def("_pointwise_forward_grad(" + pointwise + ") -> (Tensor, Tensor, Tensor)");
  def("_pointwise_backward(Tensor grad, " + pointwise + ") -> (Tensor, Tensor)");

  const std::string softmax = std::string("(Tensor input, Tensor? mask=None, ") + kSoftmaxArguments + ") -> Tensor";
  def("softmax" + softmax);
  def("log_softmax" + softmax);
  def(std::string("logsumexp(Tensor input, Tensor? mask=None, ") + kLogsumexpArguments + ") -> Tensor");
  def(std::string("_softmax_forward(Tensor input, Tensor? mask, ") + kSoftmaxSlicesArguments + ") -> Tensor");
  def(std::string("_softmax_backward(Tensor grad, Tensor result, Tensor? mask, ") + kSoftmaxSlicesArguments +
      ") -> Tensor");
  def(std::string("_logsumexp_forward(Tensor input, Tensor? mask, ") + kLogsumexpSlicesArguments + ") -> Tensor");
  def(std::string("_logsumexp_backward(Tensor grad, Tensor result, Tensor input, Tensor? mask, ") +
      kLogsumexpSlicesArguments + ") -> Tensor");

  for (const std::string name : {"masked_sum", "masked_mean"}) {
    def(name + "(Tensor input, Tensor? mask=None, " + kReductionArguments + ") -> Tensor");
  }
  for (const std::string name : {"masked_var", "masked_std"}) {
    def(name + "(Tensor input, Tensor? mask=None, " + kVarianceArguments + ") -> Tensor");
  }
  def(std::string("masked_whiten(Tensor input, Tensor? mask=None, ") + kWhitenArguments + ") -> Tensor");
  def("_masked_moments(Tensor input, Tensor? mask, int order, int[] dim) -> (Tensor, Tensor, Tensor)");
  def("_masked_affine(Tensor scale, Tensor? input, Tensor? mean, Tensor? offset, Tensor? mask, SymInt[] sizes, "
      "ScalarType dtype) -> "
      "Tensor");

  // Overloads are tried in this order, and a tensor of one element would pass for a number.
  def("masked_fill.Tensor(Tensor input, Tensor mask, Tensor value) -> Tensor");
  def("masked_fill.Scalar(Tensor input, Tensor mask, Scalar value) -> Tensor");
  def("masked_fill_.Tensor(Tensor(a!) input, Tensor mask, Tensor value) -> ()");
  def("masked_fill_.Scalar(Tensor(a!) input, Tensor mask, Scalar value) -> ()");

  def("sequence_mask(Tensor lengths, SymInt maxlen, str padding_side='right') -> Tensor");
  def("causal_mask(SymInt query_len, SymInt? key_len=None, Device? device=None) -> Tensor");
  def("mask_from_ids(Tensor tokens, int[1] ids) -> Tensor");
}
