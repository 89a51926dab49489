# Takes the driver off the device and puts it back, at both levels: each time the device is reset and its rings start
# over. Data written before has to be there after.
# ROUNDS: how often each (2).

pattern rebind 4194304 >/tmp/pattern
sum=$(sha256sum </tmp/pattern | cut -d ' ' -f 1)
dd if=/tmp/pattern of=$DISK bs=64k conv=notrunc 2>/dev/null
sync

virtio=$(basename "$(readlink -f $SYS/device)")
pci=$(basename "$(readlink -f $SYS/device/..)")
gone() { [ ! -e $DISK ]; }
there() { [ -b $DISK ]; }

# again DRIVER_DIRECTORY DEVICE
again() {
    echo "$2" >"$1/unbind" || fail "unbind of $2"
    wait_until 20 gone || fail "the disk does not go away"
    echo "$2" >"$1/bind" || fail "bind of $2"
    wait_until 20 there || fail "the disk does not come back"
    expect "content after $2 is bound again" "$(checksum 0 4096)" "$sum"
    fio --name=after --filename=$DISK --offset=4m --size=2m --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bs=4k \
        --verify=crc32c --numjobs=1 --output-format=terse >/tmp/fio.out 2>&1 || fail "fio: $(cat /tmp/fio.out)"
}
round=0
while [ $round -lt "${ROUNDS:-2}" ]; do
    round=$((round + 1))
    again /sys/bus/virtio/drivers/virtio_blk "$virtio"
    again /sys/bus/pci/drivers/virtio-pci "$pci"
    # The virtio device is numbered anew.
    virtio=$(basename "$(readlink -f $SYS/device)")
done
echo "$((2 * round)) times unbound and bound"
