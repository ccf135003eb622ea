"""`python -m sparselab`."""

import sys

from sparselab.cli import main

sys.exit(main())
