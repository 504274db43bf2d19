"""``python -m cnf.cli`` is ``cnf``."""

import sys

from cnf.cli.main import main

sys.exit(main())
