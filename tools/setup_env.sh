#!/usr/bin/env bash
# Makes .venv with everything the project needs, pinned by constraints.txt; does nothing when it is there already.
# Where the Python found has a CUDA build of torch (an NGC container), .venv stands on that installation and uses its torch.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv_python=.venv/bin/python stamp=.venv/.ready
# The folder counts too: the commands in .venv/bin name it, so an environment that was copied or moved is made again.
state="$(cat setup.py pyproject.toml constraints.txt tools/setup_env.sh tools/held_versions.py | cksum) $PWD"

runs() { "$@" >/dev/null 2>&1; }
usable() { runs "$1" -c "import sys, $2; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"; }
has_cuda_torch() { runs "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; }

if [[ -f $stamp && "$(<"$stamp")" == "$state" ]] && runs "$venv_python" -I -S -c ''; then
    exit 0
fi

find_python() {
    local names=(python3.12 python3.11 python3) name path
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        # Every place on PATH, not only the first: a version manager's stand-in may be there and refuse to run.
        while read -r path; do
            if usable "$path" "venv, ensurepip"; then
                printf '%s\n' "$path"
                return
            fi
        done < <(type -aP "$name")
    done
    echo "set-up: ${names[*]}: no Python 3.11 or 3.12 with venv and ensurepip runs here; install one (Debian and Ubuntu:" \
        "also python3-venv), or name it with PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    "$python" -m venv --clear "$@" .venv
}

on_installation() { grep -qs 'include-system-site-packages = true' .venv/pyvenv.cfg; }

pip_install() {
    # The variable takes the place of a container's own PIP_CONSTRAINT, which would forbid what the project needs.
    PIP_CONSTRAINT="$constraints" "$venv_python" -m pip --disable-pip-version-check install --quiet --progress-bar off "$@"
}

rm -f "$stamp"
if ! usable "$venv_python" pip || ! grep -qsF "$PWD/.venv" .venv/bin/activate; then
    python=$(find_python)
    echo "set-up: making .venv with $("$python" --version)"
    if has_cuda_torch "$python"; then
        make_venv --system-site-packages
    fi
    # A Python that is itself a virtual environment hands on its base's packages, not its own.
    if ! on_installation || ! has_cuda_torch "$venv_python"; then
        make_venv
    fi
fi
readonly project='.[dev]' progress="set-up: installing the project and its other packages (once)"
if on_installation; then
    constraints=.venv/constraints.txt
    "$venv_python" tools/held_versions.py constraints.txt >"$constraints"
    echo "set-up: using the CUDA build of torch that is here, version $(sed -n 's/^torch==//p' "$constraints")"
    echo "$progress"
    if ! pip_install --editable "$project" 2>.venv/pip.log; then
        # Say, a pinned pandas that needs a newer numpy than the one that Transformer Engine was compiled against.
        echo "set-up: the pins do not fit beside what is here (.venv/pip.log); taking versions that do"
        "$venv_python" tools/held_versions.py >"$constraints"
        pip_install --editable "$project"
    fi
else
    constraints=constraints.txt
    torch=$(grep '^torch==' constraints.txt)
    echo "set-up: installing $torch (once; this can take minutes)"
    pip_install "$torch"
    echo "$progress"
    pip_install --editable "$project"
fi
printf '%s\n' "$state" >"$stamp"
echo "set-up: done"
