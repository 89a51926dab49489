#!/bin/busybox sh
# The guest's first and only process: loads the drivers, runs the script of this boot and reports.
#
# ttyS0 is the kernel's console. ttyS1 carries what the script prints, between "@@ begin" and "@@ exit STATUS"; boot.sh
# reads it. A virtio-serial port, when there is one, is the script's line to the host (see lib.sh).
/bin/busybox mkdir /busybox
/bin/busybox --install -s /busybox
# The real tools come first, busybox stands in for the rest.
export PATH=/bin:/busybox
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec </dev/null >/dev/ttyS0 2>&1
stty -F /dev/ttyS1 raw -echo

report() { echo "$*" >/dev/ttyS1; }
finish() {
    # A line of its own, whatever the script left unfinished.
    printf '\n@@ exit %s\n' "$1" >/dev/ttyS1
    sync
    poweroff -f
    sleep 60
}

while read -r module; do
    insmod "/modules/$module.ko" || echo "init: module $module does not load"
done </modules/order

. /run/env
# At most ten seconds, for a path that may be a pattern.
wait_for() {
    local round path
    for round in $(seq 200); do
        for path in $1; do
            [ ! -e "$path" ] || return 0
        done
        sleep 0.05
    done
    return 1
}
if [ "$DISKS" -gt 0 ] && ! wait_for /dev/vda; then
    report "@@ begin"
    report "init: no disk appeared as /dev/vda; the drivers see:"
    cat /sys/bus/virtio/devices/*/status /sys/bus/pci/devices/*/class >/dev/ttyS1 2>&1
    finish 125
fi
# Without a port ask_host says what is wrong.
[ "$CHANNEL" = 0 ] || wait_for '/dev/vport*p1'
report "@@ begin"
cd /tmp || finish 125
sh -eu -c '. /run/env; . /lib/lib.sh; . /run/script' script </dev/null >/dev/ttyS1 2>&1
finish $?
