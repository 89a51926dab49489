# shellcheck shell=bash
# Shared by the scripts of this folder, sourced: where things are kept, and how a script says that it cannot go on.
# Not for the guest: what runs inside it is init.sh and scripts/.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
# Everything that can be made again lives here: kernel, initramfs, verdict about KVM.
STATE=${RINGBLK_GUEST_DIR:-$REPO/target/guest}
# Administrators' tools are not on the path of every user.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die STATUS TEXT...
die() {
    local status=$1
    shift
    say "$@"
    exit "$status"
}
