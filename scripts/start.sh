# Sourced by the commands beside it: `start NAME ARGS…` sets up .venv and runs NAME.py in it.
set -euo pipefail
root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")" # not cd, which obeys CDPATH
unset PYTHONHOME # of another Python: no virtual environment starts with it

start() {
  PYTHONPATH="$root" exec "${PYTHON:-python3}" "$root/scripts/bootstrap.py" "$@"
}
