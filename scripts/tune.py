"""Find the configuration that serves a model fastest on this machine within a latency limit."""

import sys

from service.tuning.tuning import main

if __name__ == "__main__":
    sys.exit(main())
