"""Distinguishes errors of writing that may pass, by themselves or by making room, such as a full disk, from those that
last until their cause is corrected, such as a file system that has become read-only.
"""

import contextlib
import errno
import logging
import re
from collections.abc import Iterator

logger = logging.getLogger("train")

MAY_PASS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO),  # room; a disk or a server in trouble
        *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOLCK),
        *(errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
        *(errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ENOENT, errno.ENODEV, errno.ENXIO),  # the folder is gone: a disk that is not mounted
    }
)
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # in the errors of safetensors and tokenizers, which are no OSError


def may_pass(error: BaseException) -> bool:
    """Returns whether the same save may succeed later without anybody correcting an option, a permission or a limit."""
    if isinstance(error, MemoryError | RuntimeError):  # torch raises RuntimeError where no host memory is left
        return True
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := RUST_ERRNO.search(str(error))):
        number = int(match[1])
    return number in MAY_PASS


@contextlib.contextmanager
def only_logged(what: str) -> Iterator[None]:
    """Turns an OSError within the block into a warning, for what a run and its checkpoints can do without."""
    try:
        yield
    except OSError as error:
        logger.warning("%s (%s); the checkpoints are whole all the same", what, error)
