"""`python -m preftree`, for launchers that want a module (`accelerate launch -m preftree dpo ...`)."""

import sys

from preftree.cli import main

sys.exit(main())
