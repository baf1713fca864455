# Sourced by the other scripts: makes (or finds) the project's virtual environment and enters it.
#   DSTRAIN_VENV   where the environment lies (default: .venv in the checkout)
#   PYTHON         which Python makes it (default: python3)
# Versions that the test suite runs with stand in tools/constraints.txt; pyproject.toml itself keeps ranges.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DSTRAIN_VENV:-$ROOT/.venv}

say() { printf '\n== %s\n' "$*"; }

# ensure_environment "" | "[plots]" | "[test]": installs dstrain with these extras, once per state of what they are read from.
ensure_environment() {
  local extras=$1 state
  state=$(cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/tools/constraints.txt" | cksum | cut -d' ' -f1)
  if [ -f "$VENV/.installed-$state$extras" ] || [ -f "$VENV/.installed-$state[test]" ]; then
    say "environment: $VENV (up to date)"
  else
    say "environment: installing dstrain$extras into $VENV (a few minutes the first time)"
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$ROOT/tools/constraints.txt" --editable "$ROOT$extras"
    touch "$VENV/.installed-$state$extras"
  fi
  export PATH=$VENV/bin:$PATH
  if ! "$VENV/bin/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    export DS_ACCELERATOR=cpu
  fi
}
