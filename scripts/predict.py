"""Ask a running server what is in some images."""

import sys

from service.client import main

if __name__ == "__main__":
    sys.exit(main())
