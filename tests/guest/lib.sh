# shellcheck shell=dash
# What the guest scripts share; init.sh sources it before the script. POSIX sh as busybox understands it.

# The disk under test.
DISK=/dev/vda
SYS=/sys/block/vda
export DISK SYS

# Busybox prefers its own applets, which lack options of these.
blkdiscard() { /bin/blkdiscard "$@"; }
blockdev() { /bin/blockdev "$@"; }

# A script that finds something wrong says so and ends.
fail() {
    echo "FAILED: $*"
    exit 1
}

# fail unless two values are equal: expect WHAT IS WANTED
expect() {
    [ "$2" = "$3" ] || fail "$1 is '$2', expected '$3'"
    echo "$1: $2"
}

# The size of the disk in bytes.
disk_bytes() { echo $(($(cat $SYS/size) * 512)); }

# Number of requests of one kind that the kernel saw complete: requests read|write|discard|flush
requests() {
    set -- "$1" $(cat $SYS/stat)
    case $1 in
        read) echo "$2" ;;
        write) echo "$6" ;;
        discard) echo "${13}" ;;
        flush) echo "${17}" ;;
    esac
}

# Everything that the page cache holds of the disk is written out and dropped: the next read asks the device.
drop_cache() {
    sync
    blockdev --flushbufs $DISK
    echo 3 >/proc/sys/vm/drop_caches
}

# A reproducible pattern: pattern SEED BYTES >file. Different seeds give different content.
pattern() { yes "ringblk $1 0123456789abcdef" | head -c "$2"; }

# The checksum of a range of the disk, read from the device: checksum OFFSET_KIB LENGTH_KIB
checksum() {
    drop_cache
    dd if=$DISK bs=1k skip="$1" count="$2" 2>/dev/null | sha256sum | cut -d ' ' -f 1
}

# Asks the host to do something and prints its answer; the host's side is the socket of boot.sh --channel. One line
# each way. An answer that starts with "error" is a failure, as is a boot without a channel.
ask_host() {
    [ "$CHANNEL" = 1 ] || fail "this script talks to the host: boot it with --channel"
    local port answer
    for port in /dev/vport*p1; do :; done
    exec 7<>"$port" || fail "the channel does not open"
    echo "$*" >&7
    read -r answer <&7 || fail "the host closed the channel"
    exec 7>&-
    case $answer in
        error*) fail "the host answers: $answer" ;;
    esac
    echo "$answer"
}

# Waits until a command succeeds, at most about SECONDS: wait_until SECONDS COMMAND...
wait_until() {
    local rounds=$(($1 * 10))
    shift
    while ! "$@"; do
        rounds=$((rounds - 1))
        [ $rounds -gt 0 ] || return 1
        sleep 0.1
    done
}
