"""python -m decm_lightning: the same as decm."""

import sys

from decm_lightning.cli import main

sys.exit(main())
