"""`python -m training` is the program `tiny-onn`."""

import sys

from training.cli import main

sys.exit(main())
