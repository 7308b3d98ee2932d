#!/bin/sh
# The `refit` command with the NIXL of this folder.
here=$(dirname -- "$(readlink -f -- "$0")") || exit 1
exec "$here/with-nixl" "$here/bin/refit" "$@"
