"""What clears up after a launcher that had no chance to: kill -9, or the system out of memory."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

# Reads until the pipe ends, which the system closes however its writer ended: nothing is polled,
# and it is the same on Linux and macOS. In the background, so that it is nobody's child. What is
# killed may be in the middle of making a file: the folder goes a second later.
SCRIPT = """
groups=
exec 3<&0
{
    while read -r line; do
        if [ "$line" = dismissed ]; then exit; fi
        groups="$groups -$line"
    done
    kill -9 $groups
    sleep 1
    rm -rf "$0"
} <&3 3<&- &
"""


class Guardian:
    """A process that waits for the end of this one, then kills what it has started.

    At an orderly end it is dismissed, and does nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        """`folder` is removed as well; "" is none."""
        reader, self._pipe = os.pipe()  # no child of ours inherits the end that we write to
        try:
            subprocess.run(
                ["/bin/sh", "-c", SCRIPT, folder and Path(folder).absolute()],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # what ends our group, a closed terminal too, leaves it be
                check=True,
            )
        finally:
            os.close(reader)

    def __enter__(self) -> "Guardian":
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def watch(self, group: int) -> None:
        """Have a process group killed as well."""
        self._tell(str(group))

    def dismiss(self) -> None:
        """All has ended, and the folder is gone."""
        self._tell("dismissed")
        os.close(self._pipe)

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # somebody has ended it: we go on without
            os.write(self._pipe, f"{line}\n".encode())
