"""`python -m lit_mult` is `lit-mult`."""

import sys

from lit_mult.cli import main

sys.exit(main())
