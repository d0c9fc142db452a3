"""Make model_store/{model}.mar: weights and labels in, a self-contained archive out."""

import sys

from service.archive.packaging import main

if __name__ == "__main__":
    sys.exit(main())
