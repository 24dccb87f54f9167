"""Standard input, output and error of a process, which its parent may have closed, and whose reader may be gone."""

import os
import select
import sys


def open_closed_streams() -> None:
    """Opens what the parent has closed of standard input, output and error, as `2>&-` does, on /dev/null. Otherwise the
    next file that is opened takes that number, and a library that writes to standard error writes into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def flush_standard_output() -> OSError | None:
    """Writes what was printed and is still in a buffer. Returns the error if standard output does not take it: that its
    reader is gone is not reported, any other error is. What is printed later goes to /dev/null.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return error
    return None


def is_of_standard_output(error: OSError) -> bool:
    """Flushes standard output. Returns whether the error is that it cannot be written, which needs no traceback."""
    unwritten = flush_standard_output()
    if unwritten is None:
        return isinstance(error, BrokenPipeError) and has_no_reader()
    return unwritten.errno == error.errno and error.filename is None


def has_no_reader() -> bool:
    """Returns whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
