"""Which errors of reading another try may cure, and how long to wait before each try."""

import asyncio
import errno
import http.client
import socket
import ssl

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

WAITS_S = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # before each try; back to the first when rows have come

CONNECTION_ERRORS = (
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,  # fsspec's; another class than TimeoutError before Python 3.11
    socket.gaierror,
    ssl.SSLError,
    http.client.HTTPException,
)
# None is imported: which of them is installed depends on the versions of `datasets` and `fsspec`.
HTTP_CLIENTS = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
FINAL_ERRORS = (OfflineModeIsEnabled, FileNotFoundError, PermissionError)
PASSING_ERRNOS = {
    errno.EIO,
    errno.ESTALE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
PASSING_STATUS = {408, 425, 429}  # and all from 500 on


def is_connection_trouble(error: BaseException | None) -> bool:
    """Returns whether another try may succeed. It does not help with a damaged file, for which arrow and gzip raise an
    OSError without a number.
    """
    if error is None or isinstance(error, FINAL_ERRORS):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUS or error.response.status_code >= 500
    if isinstance(error, CONNECTION_ERRORS) or (isinstance(error, OSError) and error.errno in PASSING_ERRNOS):
        return True
    if any(base.__module__.split(".")[0] in HTTP_CLIENTS for base in type(error).__mro__):
        return True
    return is_connection_trouble(error.__cause__)
