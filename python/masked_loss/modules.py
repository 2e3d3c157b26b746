"""``nn.Module`` shells of the functions."""

from typing import List, Optional, Union

from torch import Tensor, nn

from . import functional

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.Module):
    """:func:`masked_loss.cross_entropy` as a module; ``forward`` takes what changes from batch to batch.

    Args:
        weight, class_mask: as in the function, of shape ``(C,)``; kept as buffers.
        ignore_index, reduction, label_smoothing, z_loss, dim: as in the function.

    >>> import torch
    >>> loss = CrossEntropyLoss(dim=-1)
    >>> loss(torch.zeros(1, 2, 4), torch.tensor([[3, 9]]), torch.tensor([[True, False]]))
    tensor(1.3863)
    """

    weight: Optional[Tensor]
    class_mask: Optional[Tensor]

    def __init__(
        self,
        weight: Optional[Tensor] = None,
        *,
        class_mask: Optional[Tensor] = None,
        ignore_index: Union[int, List[int]] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dim: int = 1,
    ) -> None:
        super().__init__()
        functional._reduction_number("CrossEntropyLoss", reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("class_mask", class_mask)
        self.ignore_index: List[int] = functional._id_list("CrossEntropyLoss", "ignore_index", ignore_index)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.dim = dim

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Optional[Tensor] = None,
        sample_weight: Optional[Tensor] = None,
        normalizer: Optional[Union[int, float, Tensor]] = None,
    ) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            mask,
            weight=self.weight,
            sample_weight=sample_weight,
            class_mask=self.class_mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            normalizer=normalizer,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, dim={self.dim}"
        )
