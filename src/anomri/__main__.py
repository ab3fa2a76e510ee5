"""``python -m anomri``."""

import sys

from anomri.cli import main

sys.exit(main())
