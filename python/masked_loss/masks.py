"""Functions that make masks. True = keep."""

from typing import List, Optional, Union

import torch
from torch import Tensor

from ._arguments import id_list
from ._dispatch import bound, scriptable, use_bound

__all__ = ["causal_mask", "mask_from_ids", "sequence_mask"]


def __dir__() -> List[str]:
    return __all__


@scriptable
def sequence_mask(lengths: Tensor, maxlen: Optional[int] = None, *, padding_side: str = "right") -> Tensor:
    """True at the positions inside each sequence of a padded batch.

    Args:
        lengths: integers. A length above ``maxlen`` counts as ``maxlen``, a negative one as 0.
        maxlen: size T of the padded dimension; by default the largest length. On a GPU the default waits for the
            device.
        padding_side: ``'right'`` or ``'left'``: the side of the padding.

    Shape:
        - ``lengths``: any shape ``(...)``.
        - Output: ``(..., T)``.

    Returns:
        A bool tensor.

    Raises:
        TypeError: ``lengths`` is not an integer tensor.
        ValueError: an unknown ``padding_side``, or a negative ``maxlen``.

    >>> sequence_mask(torch.tensor([2, 0, 3]))
    tensor([[ True,  True, False],
            [False, False, False],
            [ True,  True,  True]])
    """
    if not torch.jit.is_scripting():
        if not isinstance(lengths, Tensor):
            return bound.sequence_mask(lengths, 0, padding_side)  # an error that says so
    if maxlen is None:
        maxlen = max(int(lengths.max()), 0) if lengths.numel() > 0 else 0
    if not torch.jit.is_scripting():
        if use_bound(lengths):
            return bound.sequence_mask(lengths, maxlen, padding_side)
    return torch.ops.masked_loss.sequence_mask(lengths, maxlen, padding_side)


@scriptable
def causal_mask(query_len: int, key_len: Optional[int] = None, *, device: Optional[torch.device] = None) -> Tensor:
    """True where a query may attend to a key: where the key's position is not after the query's.

    Args:
        query_len: number of queries T.
        key_len: number of keys S; by default T. Queries and keys are aligned at the top left, as ``is_causal`` of
            :func:`torch.nn.functional.scaled_dot_product_attention`.
        device: device of the mask; by default torch's default device, or the CPU in TorchScript.

    Shape:
        - Output: ``(T, S)``.

    Returns:
        A bool tensor.

    Raises:
        ValueError: a negative length.

    >>> causal_mask(2, 3)
    tensor([[ True, False, False],
            [ True,  True, False]])
    """
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # takes no device, and sizes as numbers that no longer follow the input's
            keys = query_len if key_len is None else key_len
            return torch.ones(query_len, keys, dtype=torch.bool, device=device).tril()
        if device is None:  # by a tensor, which a compiler follows too
            device = torch.empty(0).device if torch.compiler.is_compiling() else torch.get_default_device()
        if use_bound():
            return bound.causal_mask(query_len, key_len, torch.device(device))  # torch takes names of devices too
    return torch.ops.masked_loss.causal_mask(query_len, key_len, device)


def mask_from_ids(tokens: Tensor, ids: Union[int, List[int]]) -> Tensor:
    """True where a token is none of ``ids``, such as padding ids and special tokens.

    Args:
        tokens: any integer dtype.
        ids: one id, or a list of ids.

    Shape:
        - ``tokens``: any shape.
        - Output: the same shape.

    Returns:
        A bool tensor.

    Raises:
        TypeError: ``tokens`` is not an integer tensor.

    >>> mask_from_ids(torch.tensor([[5, 0], [1, 7]]), [0, 1])
    tensor([[ True, False],
            [False,  True]])
    """
    numbers = id_list("mask_from_ids", "ids", ids)
    if not torch.jit.is_scripting():
        if use_bound(tokens):
            return bound.mask_from_ids(tokens, numbers)
    return torch.ops.masked_loss.mask_from_ids(tokens, numbers)
