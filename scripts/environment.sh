# Sourced by quickstart.sh and test.sh: a virtual environment with this checkout and the tested versions in it.
# Usage: make_environment FOLDER [EXTRA]   installs into FOLDER unless nothing has changed since the last time

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python python3.11 python3.12 python3.13 python3.14; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed and none was found on PATH; install it, or set PYTHON=/path/to/python3"
}

make_environment() {
  local folder=$1 extra=${2:-} python stamp wanted
  stamp="$folder/.opsd-installed"
  wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
  if [ -f "$stamp$extra" ] && [ "$(cat "$stamp$extra")" = "$wanted" ]; then
    return
  fi
  python=$(find_python)
  # Where venv failed half-way (no ensurepip) there is a python without pip.
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$folder" ||
    fail "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
  echo "Installing opsd and its dependencies into $folder (several minutes the first time) ..." >&2
  # torch first and alone: a range that is resolved among others may pull another build of it.
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  echo "$wanted" >"$stamp"
  echo "$wanted" >"$stamp$extra"
}
