#!/usr/bin/env bash
# Chromium for the tests in this folder, as Debian packages it. Does nothing where there is one.
set -euo pipefail
if command -v chromium > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null; then
    echo "The tests of the explorer need a browser named chromium in PATH, and there is no apt-get to install it." >&2
    echo "Install Chromium in your system's way, or run \`make test-fast\`, which needs none." >&2
    exit 1
fi
echo "Installing Chromium with apt-get."
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
# Without its fonts a page has no text.
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    chromium fonts-liberation
