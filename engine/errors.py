"""What can go wrong, and what a person or a client is told.

    DoorbusterError
      UserError            a mistake at the keyboard or in a file: what, where, why, and the command that fixes it
        ScenarioError      a scenario file that cannot be used
        CalibrationError   a calibration that is missing, stale or foreign
        JournalError       a journal that cannot be read or replayed
        LedgerError        a ledger that cannot be opened or read (ledger/errors.py)
      RequestError         an answer to a client: HTTP status, stable code, the parameter at fault

The codes are a contract (README, "HTTP"); policies name a code, the ingress turns it into a status and a body.
"""

from __future__ import annotations

STATUS_OF_CODE: dict[str, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_slow": 408,
    "headers_too_slow": 408,
    "body_too_large": 413,
    "uri_too_long": 414,
    "unsupported_encoding": 415,
    "rate_limited": 429,  # the tenant's own limit
    "headers_too_large": 431,
    "internal_error": 500,
    "model_failed": 500,
    "overloaded": 503,  # the system's limit
    "breaker_open": 503,
    "replica_lost": 503,  # its process died, and none has taken its place yet
    "upstream_busy": 503,  # every server that was asked takes no more at the moment
    "draining": 503,
    "deadline_exceeded": 504,
}

TYPE_OF_STATUS: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}  # the words of the OpenAI error object; every other status is an "invalid_request_error"


class DoorbusterError(Exception):
    """Root of all errors that doorbuster raises on purpose."""


class UserError(DoorbusterError):
    """A mistake that the person at the keyboard can mend; printed in four parts, never as a traceback."""

    def __init__(self, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what, where, why, fix)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.fix:
            lines.append(f"  fix:  {self.fix}")
        return "\n".join(lines)


class ScenarioError(UserError):
    """A scenario file, or a ``--set``, that cannot be used."""


class CalibrationError(UserError):
    """No calibration, or one that was measured on another machine, model or thread count."""


class JournalError(UserError):
    """A journal that is missing, damaged or of another version."""


class RequestError(DoorbusterError):
    """A refusal with the words a client gets: the OpenAI error object is made of these fields."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code, self.message, self.param = code, message, param

    @property
    def status(self) -> int:
        """HTTP status of the code."""
        return STATUS_OF_CODE[self.code]

    @property
    def type(self) -> str:
        """The ``type`` of the OpenAI error object."""
        return TYPE_OF_STATUS.get(self.status, "invalid_request_error")
