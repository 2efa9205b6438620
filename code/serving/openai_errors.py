"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` and a status."""

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from nextgpt.common.errors import ContextLengthError, UserError
from nextgpt.serving.scheduler import InternalError, Overloaded, QueueFull

_MAX_MESSAGE = 1000  # characters: it may quote the request
RETRY_SECONDS = 10  # for clients that come back when there is no capacity


class RequestError(UserError):
    """A faulty request.

    Args:
        message: names the fault and the remedy.
        param: the field, as `messages[0].content`.
        status: of HTTP.
        code: for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    @classmethod
    def from_validation(cls, error: ValidationError) -> "RequestError":
        """Name the first faulty field."""
        first = error.errors()[0]
        param = ""
        for key in first["loc"]:
            param += f"[{key}]" if isinstance(key, int) else f".{key}" if param else key
        message = first["msg"].removeprefix("Value error, ")
        return cls(f"{param}: {message}" if param else message, param or None)


def error_body(error: UserError) -> dict[str, Any]:
    """Return the body of an error."""
    kind, param, code = "invalid_request_error", None, None
    if isinstance(error, QueueFull):
        kind, code = "rate_limit_error", "queue_full"
    elif isinstance(error, ContextLengthError):
        code = "context_length_exceeded"
    elif isinstance(error, InternalError):
        kind = "server_error"
    elif isinstance(error, RequestError):
        param, code = error.param, error.code
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]} ..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: UserError) -> JSONResponse:
    """Return the response to a request that failed with `error`."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if isinstance(error, Overloaded) else None
    return JSONResponse(error_body(error), _status(error), headers)


def _status(error: UserError) -> int:
    if isinstance(error, QueueFull):
        return 429
    if isinstance(error, Overloaded):
        return 503
    if isinstance(error, InternalError):
        return 500
    return error.status if isinstance(error, RequestError) else 400
