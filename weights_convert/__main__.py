"""`python -m weights_convert` is the command `weights-convert`. Ctrl-C is one line from its first import on."""

import signal
import sys

try:
    from weights_convert.cli import main

    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop
except KeyboardInterrupt:
    sys.exit("weights-convert: stopped; nothing is at the target that was not there before")
sys.exit(status)
