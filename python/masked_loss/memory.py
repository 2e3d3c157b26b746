"""The memory that masked_loss keeps."""

from . import _C

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Releases all unoccupied memory that masked_loss keeps on the CPU, so that other allocations can use it.

    A large output (4 MiB or more) lies in a block of its own, which is kept when it is freed: the next output of about
    that size needs no fresh pages. At most 4 blocks are kept, and 1 GiB in all; the environment variable
    ``MASKED_LOSS_CACHE_BYTES`` sets another number of bytes (0 keeps none), and ``MASKED_LOSS_HUGE_PAGES=0`` leaves
    these outputs to torch's allocator. The kernel takes the pages of a kept block back when memory is short, but until
    then they count in the process's size.

    Memory of tensors that are in use is not touched, and neither is that of a GPU, which torch allocates:
    :func:`torch.cuda.empty_cache` is for that.

    >>> empty_cache()
    """
    _C.empty_cache()
