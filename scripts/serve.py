"""Package the models, start TorchServe in the foreground, say when it is ready, stop it cleanly."""

import sys

from service.serving import main

if __name__ == "__main__":
    sys.exit(main())
