# A read-only disk: the guest is told, reading works, writing is refused and changes nothing. The kernel
# refuses by itself what the device told it: that the device would, too, is for the protocol tests to see.

expect "read-only flag" "$(cat $SYS/ro)" 1
sum=$(checksum 0 1024)
if dd if=/dev/urandom of=$DISK bs=64k count=1 conv=notrunc,fsync 2>/tmp/dd; then
    fail "a write succeeds"
fi
echo "write: $(grep dd: /tmp/dd)"
expect "checksum of the first MiB" "$(checksum 0 1024)" "$sum"
