"""`python -m sdxl_ref` is the command `sdxl-ref`."""

import sys

from sdxl_ref.cli import main

sys.exit(main())
