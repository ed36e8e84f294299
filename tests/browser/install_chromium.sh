#!/usr/bin/env bash
# Makes sure that a Chromium for the browser tests is on this machine, or says what to do.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" > /dev/null; then
    echo "Browser tests will use $(command -v "$name")"
    exit 0
  fi
done

if command -v apt-get > /dev/null; then
  sudo=
  if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo > /dev/null && sudo -n true 2> /dev/null; then sudo=sudo; else sudo=none; fi
  fi
  if [ "$sudo" != none ]; then
    echo "Installing Chromium (Debian package)"
    log=$(mktemp)
    if { $sudo apt-get update && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } > "$log" 2>&1; then
      rm -f "$log"
      exit 0
    fi
    tail -n 20 "$log"
  fi
fi

if python -m playwright install chromium; then
  exit 0
fi

echo
echo "No Chromium was found and none could be installed. Install one (Debian, Ubuntu: apt-get install chromium),"
echo "or run the other tests alone: make unit"
exit 1
