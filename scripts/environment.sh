# Sourced by the other scripts. Needs python3 >= 3.10 with venv; PYTHON names another interpreter.
# Everything goes into .venv and .models, which git ignores; VENV names another environment.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# install REQUIREMENT: install this package into .venv, unless that has been done since its metadata changed.
install() {
  local python=${PYTHON:-python3} venv=${VENV:-.venv} stamp
  if ! "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "needs Python 3.10 or newer with the venv module; set PYTHON to one" >&2
    exit 1
  fi
  stamp="$venv/installed-$(echo "$1" | cat - pyproject.toml constraints.txt wnconvert/__init__.py | git hash-object --stdin)"
  if [ ! -e "$stamp" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv --clear "$venv"
    echo "installing $1 into $venv ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1"
    touch "$stamp"
  fi
  PATH="$PWD/$venv/bin:$PATH"
  export PATH
}
