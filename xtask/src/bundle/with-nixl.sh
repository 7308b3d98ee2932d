#!/bin/sh
# Runs a command with the NIXL of this folder, wherever it was unpacked: ./with-nixl COMMAND [ARGS]
here=$(dirname -- "$(readlink -f -- "$0")") || exit 1
export REFIT_NIXL_LIBRARY="$here/lib/libnixl_capi.so"
export NIXL_PLUGIN_DIR="$here/lib/plugins"
export UCX_MODULE_DIR="$here/lib/ucx"
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
if [ -d "$here/tests/golden" ]; then
    export REFIT_GOLDEN="$here/tests/golden"
fi
exec "$@"
