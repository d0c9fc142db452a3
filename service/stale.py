"""Files that a command makes of others, and that are no longer what it would make."""

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def settle(stale: Mapping[Path, str], command: str, check: bool) -> int:
    """Write the files, or to `check` only name them; the command's exit status."""
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is stale: run {command}")
        else:
            path.write_text(text, "utf-8")
            print(f"{name} is written")
    return 1 if check and stale else 0
