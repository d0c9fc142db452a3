"""Say whether the service can answer: for containers and load balancers."""

import sys

from service.health import main

if __name__ == "__main__":
    sys.exit(main())
