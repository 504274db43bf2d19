"""``python -m cnf.cli`` is ``cnf``."""

import sys

from cnf.cli.entry import main

sys.exit(main())
