"""Makes `python -m clusterweights` the same as the command `clusterweights`."""

import sys

from clusterweights.cli import main

sys.exit(main())
