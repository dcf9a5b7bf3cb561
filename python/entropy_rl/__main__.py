"""`python -m entropy_rl` runs the command `entropy-rl`."""

import sys

from entropy_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
