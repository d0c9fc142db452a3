"""Have more or fewer workers of a running model, or let their number follow the load."""

import sys

from service.scaling.scaling import main

if __name__ == "__main__":
    sys.exit(main())
