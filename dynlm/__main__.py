"""``python -m dynlm`` is the command ``dynlm``."""

import sys

from dynlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
