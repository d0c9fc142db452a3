"""Run nginx in front of one or more TorchServes."""

import sys

from service.gateway.process import main

if __name__ == "__main__":
    sys.exit(main())
