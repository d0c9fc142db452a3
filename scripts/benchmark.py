"""Load a running server, check every answer, and say how fast it was."""

import sys

from service.load.generator import main

if __name__ == "__main__":
    sys.exit(main())
