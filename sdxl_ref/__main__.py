"""`python -m sdxl_ref` is the command `sdxl-ref`. Ctrl-C is one line from its first import on."""

import signal
import sys

try:
    from sdxl_ref.cli import main

    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop
except KeyboardInterrupt:
    sys.exit("sdxl-ref: stopped")
sys.exit(status)
