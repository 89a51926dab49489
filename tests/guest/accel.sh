#!/usr/bin/env bash
# Prints "kvm" when a guest really runs under KVM on this machine, else "tcg". That /dev/kvm opens proves little: inside
# some clouds a guest then starts and hangs. So one is booted, with a time limit, and the verdict is kept for this boot
# of the machine. RINGBLK_ACCEL overrides it.
#
# Called by boot.sh.
set -euo pipefail
. "$(dirname "$0")/common.sh"

if [ -n "${RINGBLK_ACCEL-}" ]; then
    echo "$RINGBLK_ACCEL"
    exit
fi
if ! [ -r /dev/kvm ] || ! [ -w /dev/kvm ]; then
    echo tcg
    exit
fi
key=$(cat /proc/sys/kernel/random/boot_id <(qemu-system-x86_64 --version) "$STATE/kernel/complete" | sha256sum | cut -c 1-16)
verdict="$STATE/accel-$key"
if [ ! -e "$verdict" ]; then
    exec 9>"$STATE/accel.lock"
    flock 9
    if [ ! -e "$verdict" ]; then
        rm -f "$STATE"/accel-*
        if "$HERE/boot.sh" --accel kvm --timeout 8 >/dev/null 2>&1 9>&-; then
            echo kvm >"$verdict.new"
        else
            echo tcg >"$verdict.new"
        fi
        mv "$verdict.new" "$verdict"
    fi
fi
cat "$verdict"
