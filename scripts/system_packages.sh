#!/usr/bin/env bash
# The system libraries that no Python package brings: the games' renderer links to OpenGL and GLib.
# Installs what is missing where it may (root, apt); elsewhere says what to install, and training still works.
set -euo pipefail

missing=()
has() { ldconfig -p 2>/dev/null | grep -q "$1"; }
has 'libGL\.so\.1' || missing+=(libgl1)
has 'libglib-2\.0\.so\.0' || missing+=(libglib2.0-0)
((${#missing[@]})) || exit 0

if [[ $(uname) == Linux && $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} ..."
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
else
    echo "note: ${missing[*]} missing; making procgen data needs them (apt-get install ${missing[*]})" >&2
fi
