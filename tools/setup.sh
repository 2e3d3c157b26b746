#!/usr/bin/env bash
# Sets up the interpreter that `make` works with, and the system's helpers. Called by the Makefile:
#   tools/setup.sh --venv DIR PYTHON   makes DIR with PYTHON and installs requirements.txt in it
#   tools/setup.sh --use PYTHON        PYTHON has torch: adds only the requirements that it lacks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${!#}
command -v "$python" > /dev/null || fail "there is no $python; name an interpreter with PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || fail "Python 3.10 or newer is needed, $python is $("$python" -V); name another with PYTHON=/path/to/python"
command -v "${CXX:-c++}" > /dev/null || fail "a C++20 compiler is needed: gcc 11, clang 14 or newer"

# Without the first two CMake fetches GoogleTest and the next build is slower; the others come with most Pythons.
packages=()
[[ -e /usr/include/gtest/gtest.h ]] || packages+=(libgtest-dev)
command -v ccache > /dev/null || packages+=(ccache)
"$python" -c 'import ensurepip' 2> /dev/null || packages+=(python3-venv)
[[ -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || packages+=(python3-dev)
# What continuous integration reads the sources with, once more.
[[ -z ${CI:-} ]] || command -v clang++ > /dev/null || packages+=(clang libomp-dev)
if (( ${#packages[@]} && EUID == 0 )) && command -v apt-get > /dev/null; then
  say "Installing ${packages[*]} with apt-get"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "${packages[@]}"; } > /dev/null 2>&1 \
    || say "apt-get could not install them: going on without"
fi

case $1 in
  --venv)
    [[ -x $2/bin/python ]] || { say "Making $2 with $("$python" -V)"; "$python" -m venv "$2"; }
    say "Installing requirements.txt into $2 (torch is large: this can take minutes)"
    "$2/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    ;;
  --use)
    say "Using $python, which has torch: no .venv is made"
    "$python" -m pip --version > /dev/null || "$python" -m ensurepip
    missing=$("$python" - <<'END'
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    build = {r.name: r.specifier for r in map(Requirement, tomllib.load(file)["build-system"]["requires"])}
for line in open("requirements.txt"):
    text = line.partition("#")[0].strip()
    if not text or (Requirement(text).marker and not Requirement(text).marker.evaluate()):
        continue
    name = Requirement(text).name
    try:
        if name not in build or metadata.version(name) in build[name]:
            metadata.version(name)
            continue
    except metadata.PackageNotFoundError:
        pass
    print(text.partition(";")[0].strip())
END
    )
    if [[ -n $missing ]]; then
      say "Installing what it lacks:" $missing
      "$python" -m pip install --quiet --disable-pip-version-check $missing
    fi
    ;;
  *) fail "expected --venv or --use, got $1" ;;
esac
