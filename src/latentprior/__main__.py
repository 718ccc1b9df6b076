"""Run the command line as ``python -m latentprior``."""

from .cli import main

raise SystemExit(main())
