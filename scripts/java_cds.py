"""Write down Java's classes as it keeps them in memory, so that TorchServe starts in less time."""

import sys

from service.torchserve.java_cds import main

if __name__ == "__main__":
    sys.exit(main())
