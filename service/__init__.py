"""Commands around the handler: set up, package, serve, check and ask."""

import io
import sys

# A file's name or a label may have characters that the terminal has not. They are shown as escapes,
# as on stderr, instead of ending the command.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
