from torch import Tensor, device, dtype

def cross_entropy(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    class_mask: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: list[int],
    label_smoothing: float,
    z_loss: float,
    dim: int,
    dtype: dtype | None,
) -> Tensor: ...
def loss_normalizer(
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    class_mask: Tensor | None,
    ignore_index: list[int],
    dim: int,
) -> Tensor: ...
def check_targets(target: Tensor, num_classes: int, mask: Tensor | None, ignore_index: list[int]) -> Tensor: ...
def mse_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    beta: float,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def huber_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    delta: float,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def kl_div(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    log_target: bool,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    log_input: bool,
    full: bool,
    eps: float,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor,
    mask: Tensor | None,
    reduction: int,
    full: bool,
    eps: float,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: int,
    alpha: float,
    gamma: float,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    dtype: dtype | None,
) -> Tensor: ...
def softmax(input: Tensor, mask: Tensor | None, dim: int, causal: bool, dtype: dtype | None) -> Tensor: ...
def log_softmax(input: Tensor, mask: Tensor | None, dim: int, causal: bool, dtype: dtype | None) -> Tensor: ...
def logsumexp(
    input: Tensor, mask: Tensor | None, dim: list[int], keepdim: bool, causal: bool, dtype: dtype | None
) -> Tensor: ...
def masked_sum(input: Tensor, mask: Tensor | None, dim: list[int], keepdim: bool, dtype: dtype | None) -> Tensor: ...
def masked_mean(input: Tensor, mask: Tensor | None, dim: list[int], keepdim: bool, dtype: dtype | None) -> Tensor: ...
def masked_var(
    input: Tensor, mask: Tensor | None, dim: list[int], keepdim: bool, correction: float, dtype: dtype | None
) -> Tensor: ...
def masked_std(
    input: Tensor, mask: Tensor | None, dim: list[int], keepdim: bool, correction: float, dtype: dtype | None
) -> Tensor: ...
def masked_whiten(input: Tensor, mask: Tensor | None, dim: list[int], dtype: dtype | None) -> Tensor: ...
def masked_fill(input: Tensor, mask: Tensor, value: complex | Tensor) -> Tensor: ...
def masked_fill_(input: Tensor, mask: Tensor, value: complex | Tensor) -> None: ...
def sequence_mask(lengths: Tensor, maxlen: int, padding_side: str) -> Tensor: ...
def causal_mask(query_len: int, key_len: int | None, device: device | None) -> Tensor: ...
def mask_from_ids(tokens: Tensor, ids: list[int]) -> Tensor: ...
def empty_cache() -> None: ...
