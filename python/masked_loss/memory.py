"""The CPU memory that masked_loss caches."""

from . import _C

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Releases the unused CPU memory that masked_loss caches for its outputs.

    Outputs of 4 MiB and more are allocated in blocks of their own, on huge pages. Up to 4 freed blocks, 1 GiB in total,
    are cached: the next output of about the same size needs no fresh pages. Linux can reclaim a cached block under
    memory pressure, but the block counts in the resident size of the process until it does.

    The environment variable ``MASKED_LOSS_CACHE_BYTES`` sets the limit in bytes; 0 caches nothing.
    ``MASKED_LOSS_HUGE_PAGES=0`` leaves these outputs to torch's allocator.

    Tensors in use are not affected. GPU memory is torch's: use :func:`torch.cuda.empty_cache`.

    >>> empty_cache()
    """
    _C.empty_cache()
