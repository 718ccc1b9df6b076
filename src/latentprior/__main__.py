"""Run the command line as ``python -m latentprior``."""

from .cli.main import main

raise SystemExit(main())
