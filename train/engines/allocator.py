"""What glibc's allocator does with the memory that a training step frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep in this process what it frees, for its next tensors, instead of giving it back to the system.

    Each step makes the same tensors as the one before it. glibc gives the large ones, and what is free at the top of
    its heap, back at once, so the next step gets fresh pages, each of which the system clears and maps when it is
    first touched: of 124M parameters in bf16, 1 x 1024 tokens, 230,000 pages of 4 KB a step. The price is what lies
    free between tensors, 0.05 to 0.12 GiB of `tiny` (benchmarks/README.md). Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
