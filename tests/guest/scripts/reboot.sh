# Writes, reboots, and finds everything as it was. The disk tells the two boots apart: its first sector names this run.
# boot: may-reboot

read -r mark sum <<X
$(dd if=$DISK bs=512 count=1 2>/dev/null | tr -d '\0' | head -n 1)
X
if [ "$mark" != "reboot-$RUN" ]; then
    echo "first boot: writing"
    head -c 4194304 /dev/urandom >/tmp/data
    sum=$(sha256sum </tmp/data | cut -d ' ' -f 1)
    dd if=/tmp/data of=$DISK bs=64k seek=16 conv=notrunc 2>/dev/null
    { echo "reboot-$RUN $sum" && head -c 512 /dev/zero; } | head -c 512 >/tmp/mark
    dd if=/tmp/mark of=$DISK bs=512 count=1 conv=notrunc 2>/dev/null
    sync
    # Requests in flight while the machine is reset: the device must end them and start over.
    fio --name=busy --filename=$DISK --offset=8m --size=4m --direct=1 --ioengine=libaio --iodepth=32 --rw=randread \
        --bs=4k --time_based --runtime=60 >/dev/null 2>&1 &
    before=$(requests read)
    busy() { [ "$(requests read)" -gt $((before + 100)) ]; }
    wait_until 30 busy || fail "fio does not start"
    reboot -f
    sleep 60
    fail "the reboot does not happen"
fi
echo "second boot: reading"
expect "checksum after the reboot" "$(checksum 1024 4096)" "$sum"
