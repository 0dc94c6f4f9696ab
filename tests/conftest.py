"""Being here, this file puts ``tests/`` on the import path, for the helpers that several tests share."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background has set it so
    signal.signal(signal.SIGINT, signal.default_int_handler)
