"""The C library's allocator, set for work that takes and frees a picture's memory again and again."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_BYTES = 1 << 28


def keep_freed_memory() -> None:
    """Let this process keep freed blocks of up to 256 MB instead of handing them back to the system at once.

    By default glibc returns large blocks and gets them anew, zeroed page by page: decoding a 640 x 480 JPEG in full to
    an array took 7.3 ms that way and 1.7 ms like this on a virtual machine. Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _BYTES)
