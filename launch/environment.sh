# Sourced by the scripts of this folder: makes .venv with this project and its pinned requirements, once.
# VERSIONS=2026-05 takes the versions of launch/constraints-2026-05.txt instead, and .venv-2026-05.
# shellcheck shell=bash

# ensure_environment EXTRAS: EXTRAS is "", "[dev]" or "[dev,trl]" and the like. Activates .venv, installs into it only if something changed.
ensure_environment() {
  local extras=$1 python=${PYTHON:-python3} set=${VERSIONS:+-$VERSIONS} venv constraints stamp wanted
  venv=.venv$set constraints=launch/constraints$set.txt
  [ -f "$constraints" ] || {
    echo "error: VERSIONS is $VERSIONS, but there is no file $constraints; there are" launch/constraints*.txt >&2
    return 1
  }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version 2>&1), but Python 3.11 or newer is needed; set PYTHON" >&2
    return 1
  }
  [ -x "$venv/bin/python" ] || { echo "making $venv"; "$python" -m venv "$venv"; }
  # shellcheck disable=SC1090
  source "$venv/bin/activate"
  stamp="$venv/installed${extras}"
  wanted=$(cat pyproject.toml "$constraints" | sha256sum)
  # What was installed with the extra packages of developers serves users as well.
  [ -n "$extras" ] || [ "$(cat "$venv/installed[dev]" 2>/dev/null)" != "$wanted" ] || stamp="$venv/installed[dev]"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing dora-dist${extras} into $venv (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${extras}"
    echo "$wanted" > "$stamp"
  fi
}
