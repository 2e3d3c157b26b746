from torch import Tensor

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
def masked_fill(input: Tensor, mask: Tensor, value: complex | Tensor) -> Tensor: ...
def masked_fill_(input: Tensor, mask: Tensor, value: complex | Tensor) -> None: ...
