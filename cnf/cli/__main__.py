"""``python -m cnf.cli`` runs ``cnf``."""

import sys

from cnf.cli.main import main

sys.exit(main())
