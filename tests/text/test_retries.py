"""text/retries.py: which errors of reading another try may cure."""

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from text import retries
from text.retries import is_connection_trouble


def hub_error(status: int) -> HfHubHTTPError:
    from huggingface_hub.utils import httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return HfHubHTTPError(f"status {status}", response=response)


def of_module(module: str) -> Exception:
    return type("ClientError", (Exception,), {"__module__": module})("payload is not completed")


def caused_by(cause: Exception) -> Exception:
    error = datasets.exceptions.DatasetGenerationError("wrapped")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionError("Server Disconnected"), True),
        (TimeoutError(), True),
        (OSError(113, "No route to host"), True),
        (OSError(5, "Input/output error"), True),
        (retries.socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (retries.ssl.SSLError("record layer failure"), True),
        (retries.http.client.IncompleteRead(b""), True),
        (hub_error(503), True),
        (hub_error(429), True),
        (of_module("aiohttp.client_exceptions"), True),
        (of_module("httpx"), True),
        (caused_by(ConnectionError()), True),
        (hub_error(404), False),
        (OfflineModeIsEnabled("offline"), False),
        (FileNotFoundError(2, "gone"), False),
        (PermissionError(13, "denied"), False),
        (OSError("Corrupt snappy compressed data."), False),
        (retries.http.client.HTTPException.__base__("plain"), False),
        (pa.ArrowInvalid("JSON parse error"), False),
        (caused_by(pa.ArrowInvalid("JSON parse error")), False),
        (EOFError("Compressed file ended"), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_which_errors_another_try_may_help_against(error: Exception, passes: bool):
    assert is_connection_trouble(error) is passes
