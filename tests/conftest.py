"""For all tests: a run in the background of a script has SIGINT ignored, and so would every process that it starts."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
