"""One normalizer for a batch that is spread over processes and micro-batches."""

from typing import TYPE_CHECKING, List, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["global_normalizer"]


def __dir__() -> List[str]:
    return __all__


def _number(count: float, group: Optional["ProcessGroup"]) -> Tensor:
    """On torch's default device, unless the group cannot reduce there (NCCL on the CPU)."""
    total = torch.full([], count, dtype=torch.int64 if isinstance(count, int) else torch.float64)
    # A compiler cannot ask for a group's devices.
    if group is None or torch.compiler.is_compiling():
        return total
    kinds = [device.type for device in group._device_types]
    return total if not kinds or total.device.type in kinds else total.to(kinds[0])


def _copy(count: Tensor) -> Tensor:
    """In the dtype that adds up: int64 for integers, at least float32 for the others."""
    if count.dim() != 0:
        raise RuntimeError(
            f"global_normalizer: expected count to be a number or a 0-d tensor, got shape {list(count.shape)}"
        )
    if count.is_complex() or count.dtype == torch.bool:
        raise TypeError(f"global_normalizer: expected count of a real dtype, got {count.dtype}")
    if not count.is_floating_point():
        return count.to(torch.int64, copy=True)
    return count.detach().to(torch.float64 if count.dtype == torch.float64 else torch.float32, copy=True)


def global_normalizer(
    count: Union[float, Tensor], group: Optional["ProcessGroup"] = None, *, averaged_gradients: bool = True
) -> Tensor:
    r"""The ``normalizer`` for the mean over a batch that is spread over processes and micro-batches.

    Over :math:`P` processes with counts :math:`n_p` it is :math:`\sum_p n_p / P`, because DDP and FSDP average
    gradients, which divides by :math:`P` once more. Call it on every process of the group, also on one without unmasked
    positions, once per optimizer step and before the first backward pass. It takes a count, not a mask:
    :func:`loss_normalizer` counts unmasked positions.

    Args:
        count: the count of this process over all micro-batches of the step, such as the sum of their
            ``loss_normalizer``. A number, or a 0-d tensor of a real dtype on a device that the group reduces on. It is
            not modified.
        group: the processes that share the batch; by default all, or only this one if ``torch.distributed`` is not
            initialized.
        averaged_gradients: False if gradients are summed over the group. The result is then :math:`\sum_p n_p`.

    Returns:
        A 0-d tensor without gradient: float32 for a floating-point tensor (float64 for float64), float64 for integers
        and numbers. It is on ``count``'s device. For a number it is on torch's default device. If the group does not
        reduce there, it is on a device of the group, except under ``torch.compile``.

    Raises:
        TypeError: ``count`` is not a number or a tensor, or has a complex or bool dtype.
        RuntimeError: ``count`` is not 0-d.
        ValueError: this process is not in ``group``.

    >>> from masked_loss import loss_normalizer
    >>> counts = [loss_normalizer(torch.tensor(targets)) for targets in ([4, 2, 0], [1, -100, -100])]
    >>> global_normalizer(sum(counts))
    tensor(4.)
    """
    if not isinstance(count, (int, float, Tensor)):
        raise TypeError(f"global_normalizer: expected count to be a number or a 0-d tensor, got {type(count).__name__}")
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    size = 1 if group is None else dist.get_world_size(group)
    if size < 1:
        raise ValueError("global_normalizer: expected group to hold this process, got one without it")
    total = _copy(count) if isinstance(count, Tensor) else _number(count, group)
    if group is not None:
        dist.all_reduce(total, group=group)
    if not total.is_floating_point():
        total = total.double()
    return total / size if averaged_gradients else total
