"""Being here, this file puts ``tests/`` on the import path, for the helpers that several tests share."""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background has set it so
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--update-messages", action="store_true", help="write tests/integration/messages.yaml anew")


def pytest_configure(config):
    if config.getoption("--update-messages") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-messages writes one file: leave out --numprocesses")
