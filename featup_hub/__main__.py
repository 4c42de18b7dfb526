"""``python -m featup_hub`` is ``featup-hub``."""

import sys

from featup_hub.cli import main

if __name__ == "__main__":
    sys.exit(main())
