"""`python -m weights_convert`: the command line."""

from weights_convert.cli import main

raise SystemExit(main())
