#!/usr/bin/env bash
# Boots a small Linux guest in QEMU with vhost-user-blk disks, runs a script in it, prints what the script printed, and
# exits with the script's status.
#
#   boot.sh --socket S [--script FILE] [options]
#     --socket S         unix socket of the backend; given twice, the guest has two disks (/dev/vda, /dev/vdb)
#     --queues N         request queues of each disk (1)
#     --queue-size Q     entries of each queue (128)
#     --smp N            processors (2, or as many as queues)
#     --mem SIZE         memory (256M)
#     --script FILE      what to run; scripts/ holds some; without it the guest boots, prints its kernel and ends
#     --set NAME=VALUE   variable for the script; any number of times
#     --timeout SEC      time limit for everything (120)
#     --channel S        unix socket that boot.sh creates for the script's questions to the host: lines, each answered
#                        with one line. The guest starts when somebody has connected.
#     --reconnect        QEMU connects again when the backend goes away and comes back
#     --readonly         sets READONLY=1 for the script; that a disk is read-only is told by the backend
#     --accel kvm|tcg    instead of what accel.sh finds
#     --console FILE     keeps the kernel's messages
#     --pidfile FILE     where QEMU's process id is written
#     --qemu ARG         one more argument for QEMU; any number of times
#
# Besides the script's own: status 124, the time limit was reached; 125, the guest could not be started; 126, it ended
# without a result (QEMU's last words and the kernel's go to stderr).
#
# A script that wants to reboot says so in a line "# boot: may-reboot"; else a reboot ends the run, so that a kernel
# panic is seen at once.
#
# Called by ./demo, by the scenario tests, and by hand. Leaves nothing behind: QEMU dies with this process, however
# that ends.
set -euo pipefail
. "$(dirname "$0")/common.sh"

usage() { die 125 "$1; the head of tests/guest/boot.sh lists the options"; }

sockets=() extra=() settings=()
queues=1 queue_size=128 smp='' mem=256M script='' limit=120 channel='' reconnect=0 readonly=0 accel='' console='' pidfile=''
while [ $# -gt 0 ]; do
    option=$1
    case $option in
        --reconnect) reconnect=1 && shift && continue ;;
        --readonly) readonly=1 && shift && continue ;;
    esac
    [ $# -ge 2 ] || usage "$option needs a value"
    case $option in
        --socket) sockets+=("$2") ;;
        --queues) queues=$2 ;;
        --queue-size) queue_size=$2 ;;
        --smp) smp=$2 ;;
        --mem) mem=$2 ;;
        --script) script=$2 ;;
        --set) settings+=("$2") ;;
        --timeout) limit=$2 ;;
        --channel) channel=$2 ;;
        --accel) accel=$2 ;;
        --console) console=$2 ;;
        --pidfile) pidfile=$2 ;;
        --qemu) extra+=("$2") ;;
        *) usage "unknown option $option" ;;
    esac
    shift 2
done
for number in "$queues" "$queue_size" "${smp:-1}" "$limit"; do
    [[ $number =~ ^[1-9][0-9]{0,5}$ ]] || usage "'$number' is no number"
done
[ -n "$smp" ] || smp=$((queues > 2 ? queues : 2))
[ -z "$script" ] || [ -r "$script" ] || usage "no script '$script'"
deadline=$((SECONDS + limit))

if ! command -v qemu-system-x86_64 >/dev/null || [ ! -e "$STATE/kernel/complete" ]; then
    die 125 "QEMU or the guest's kernel is missing, run tests/guest/setup.sh"
fi
[ -n "$accel" ] || accel=$("$HERE/accel.sh")

# ---------------------------------------------------------------- the initramfs of this run

work=$(mktemp -d "${TMPDIR:-/tmp}/ringblk-guest.XXXXXX")
qemu=''
cleanup() {
    trap - EXIT
    if [ -n "$qemu" ] && kill -0 "$qemu" 2>/dev/null; then
        kill -KILL "$qemu" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

"$HERE/initramfs.sh" "$work/initrd"
mkdir -p "$work/add/run"
if [ -n "$script" ]; then
    cp "$script" "$work/add/run/script"
else
    echo 'uname -a' >"$work/add/run/script"
fi
{
    # A reboot runs the script again: it tells its own traces on the disk from older ones by RUN.
    printf 'RUN=%s DISKS=%s QUEUES=%s READONLY=%s CHANNEL=%s\n' \
        "$$-$RANDOM" "${#sockets[@]}" "$queues" "$readonly" "$([ -n "$channel" ] && echo 1 || echo 0)"
    for setting in "${settings[@]}"; do
        [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || usage "'$setting' is not NAME=VALUE"
        # Single quotes keep the value a value.
        value=${setting#*=}
        printf "%s='%s'\n" "${setting%%=*}" "${value//\'/\'\\\'\'}"
    done
} >"$work/add/run/env"
(cd "$work/add" && find run | cpio --quiet -o -H newc -R 0:0) >>"$work/initrd"

# ---------------------------------------------------------------- QEMU

case $accel in
    kvm) arguments=(-accel kvm -cpu host) ;;
    # Every processor on a thread of its own: rings are then really served while others are filled.
    tcg) arguments=(-accel tcg,thread=multi -cpu max) ;;
    *) usage "unknown accelerator '$accel'" ;;
esac
arguments+=(
    -nodefaults -no-user-config -display none -monitor none
    -machine q35,memory-backend=mem -smp "$smp" -m "$mem"
    # The backend maps the guest's memory, so it has to be shared.
    -object "memory-backend-memfd,id=mem,share=on,size=$mem"
    -kernel "$STATE/kernel/vmlinuz" -initrd "$work/initrd"
    # Some kernels cannot run a script as init before a module is loaded: busybox is init, and is told what to run.
    -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr tsc=nowatchdog rdinit=/bin/busybox -- sh /init"
    -chardev "file,id=console,path=$work/console" -device isa-serial,chardev=console,index=0
    -chardev stdio,id=output,signal=off -device isa-serial,chardev=output,index=1
)
# Milliseconds are the newer spelling, the older one is going away.
version=$(qemu-system-x86_64 --version | sed -nE '1s/.*version ([0-9]+)\.([0-9]+).*/\1 \2/p')
again=''
if [ "$reconnect" = 1 ]; then
    read -r major minor <<<"$version"
    if [ "$major" -gt 9 ] || { [ "$major" = 9 ] && [ "$minor" -ge 2 ]; }; then
        again=,reconnect-ms=100
    else
        again=,reconnect=1
    fi
fi
for i in "${!sockets[@]}"; do
    arguments+=(
        -chardev "socket,id=disk$i,path=${sockets[i]//,/,,}$again"
        -device "vhost-user-blk-pci,id=blk$i,chardev=disk$i,num-queues=$queues,queue-size=$queue_size"
    )
done
if [ -n "$channel" ]; then
    arguments+=(
        -device virtio-serial-pci
        # Waiting for the host keeps the guest's first line from getting lost.
        -chardev "socket,id=channel,path=${channel//,/,,},server=on,wait=on"
        -device virtserialport,chardev=channel,name=org.ringblk.channel,nr=1
    )
fi
[ -z "$pidfile" ] || arguments+=(-pidfile "$pidfile")
if [ -z "$script" ] || ! grep -q '^# boot: may-reboot$' "$script"; then
    arguments+=(-no-reboot)
fi
arguments+=("${extra[@]}")

# The death signal covers the one case in which the trap does not run.
exec {output}< <(exec setpriv --pdeathsig KILL qemu-system-x86_64 "${arguments[@]}" </dev/null 2>"$work/errors")
qemu=$!

# ---------------------------------------------------------------- what the guest says

complain() {
    say "$1"
    sed 's/^/  qemu: /' "$work/errors" >&2 || true
    [ ! -s "$work/console" ] || tail -n 40 "$work/console" | tr -d '\r' | sed 's/^/  console: /' >&2
}

status='' begun=0 held=''
while :; do
    left=$((deadline - SECONDS))
    line='' result=0
    if [ "$left" -gt 0 ]; then
        IFS= read -r -t "$left" -u "$output" line || result=$?
    else
        result=142
    fi
    if [ "$result" -gt 128 ]; then
        [ -z "$line" ] || printf '%s\n' "$line"
        if [ -z "$status" ]; then
            complain "time limit of $limit s reached ($accel), the guest is ended"
            status=124
        else
            # The backend may be what holds it up: it has to give its rings back.
            complain "the guest does not power off, its script ended with status $status"
            [ "$status" != 0 ] || status=126
        fi
        break
    fi
    line=${line%$'\r'}
    case $line in
        '@@ begin') begun=$((begun + 1)) ;;
        '@@ exit '*) status=${line#@@ exit } ;;
        # Held back for one line: the empty line that init puts before its marker is not the script's.
        '')
            [ -z "$held" ] || echo
            held=1
            [ "$result" != 0 ] || continue
            ;;
        *)
            [ -z "$held" ] || echo
            [ "$begun" = 0 ] || printf '%s\n' "$line"
            ;;
    esac
    held=''
    [ "$result" = 0 ] || break
    # The loop ends when QEMU does: the guest powers itself off, and the backend sees an orderly end.
    [ -z "$status" ] || deadline=$((SECONDS + 30))
done
[ -z "$console" ] || cp "$work/console" "$console" 2>/dev/null || true

if [ -z "$status" ]; then
    wait "$qemu" 2>/dev/null || true
    if [ "$begun" = 0 ] && [ ! -s "$work/console" ]; then
        complain "QEMU did not start the guest"
        exit 125
    fi
    complain "the guest ended without a result"
    exit 126
fi
[[ $status =~ ^[0-9]+$ ]] || status=126
exit "$status"
