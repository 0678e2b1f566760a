"""For all tests: ``--device``; and a way out of an ignored SIGINT.

A run in the background of a script has SIGINT ignored, and so would every process that it starts.
"""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the tests of the live model run theirs"
    )
