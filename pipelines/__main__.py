"""`python -m pipelines` runs the command `medmamba`."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
