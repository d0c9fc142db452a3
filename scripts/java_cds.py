"""Write down Java's classes as it keeps them in memory, so that TorchServe starts in less time.

scripts/java_cds.py    once after an installation; ./scripts/serve does it by itself
"""

import sys
from collections.abc import Sequence

from handler.errors import SetupError
from service.torchserve.java import JAVA_CDS, find_java
from service.torchserve.java_cds import make_java_cds


def main(argv: Sequence[str] | None = None) -> int:
    del argv  # there are no options
    try:
        make_java_cds(find_java(), JAVA_CDS)
    except SetupError as exc:
        print(f"warning: Java starts slower, without class data sharing: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
