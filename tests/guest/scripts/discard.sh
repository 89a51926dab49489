# Discards and zeroes parts of a written range; what was not named must keep its content.
# DISCARD=zero: the discarded part has to read as zeroes, as it does for files. Otherwise old or zero are both right.
# The host can see in the image's allocated blocks that space came back: MiB 4 to 6 (discard), 6 to 7 (zeroes).

echo "discard: at most $(cat $SYS/queue/discard_max_bytes) bytes, granularity $(cat $SYS/queue/discard_granularity);" \
    "write zeroes: at most $(cat $SYS/queue/write_zeroes_max_bytes) bytes"
[ "$(cat $SYS/queue/discard_max_bytes)" -gt 0 ] || fail "the disk does not offer discard"
[ "$(cat $SYS/queue/write_zeroes_max_bytes)" -gt 0 ] || fail "the disk does not offer write zeroes"

pattern discard 4194304 >/tmp/pattern
dd if=/tmp/pattern of=$DISK bs=64k seek=64 conv=notrunc 2>/dev/null
sync
# What each MiB held, and what zeroes look like.
sum_of() { dd if=/tmp/pattern bs=1M skip="$1" count="$2" 2>/dev/null | sha256sum | cut -d ' ' -f 1; }
zero_sum() { head -c "$1" /dev/zero | sha256sum | cut -d ' ' -f 1; }
expect "before: checksum of MiB 4 to 8" "$(checksum 4096 4096)" "$(sum_of 0 4)"

before=$(requests discard)
blkdiscard -o 4194304 -l 2097152 $DISK || fail "blkdiscard"
[ "$(requests discard)" -gt "$before" ] || fail "no discard request reached the device"
sum=$(checksum 4096 2048)
if [ "$sum" = "$(zero_sum 2097152)" ]; then
    echo "the discarded range reads as zeroes"
elif [ "${DISCARD-}" = zero ]; then
    fail "the discarded range does not read as zeroes"
elif [ "$sum" = "$(sum_of 0 2)" ]; then
    echo "the discarded range reads as before"
else
    # MiB by MiB either is allowed, since a device may honour a part.
    echo "the discarded range reads as a mixture"
fi
blkdiscard -z -o 6291456 -l 1048576 $DISK || fail "blkdiscard --zeroout"
expect "zeroed range" "$(checksum 6144 1024)" "$(zero_sum 1048576)"
expect "neighbour of the zeroed range" "$(checksum 7168 1024)" "$(sum_of 3 1)"

# Odd borders: one sector on either side of MiB 7, the sectors next to them stay.
sectors() { dd if=$DISK bs=512 skip="$1" count="$2" 2>/dev/null | sha256sum | cut -d ' ' -f 1; }
wanted_before=$(sectors 14334 1)
wanted_after=$(sectors 14337 1)
blkdiscard -z -o 7339520 -l 1024 $DISK || fail "blkdiscard --zeroout of two sectors"
drop_cache
expect "sectors 14335 and 14336" "$(sectors 14335 2)" "$(zero_sum 1024)"
expect "sector 14334" "$(sectors 14334 1)" "$wanted_before"
expect "sector 14337" "$(sectors 14337 1)" "$wanted_after"
# The discarded place is usable again.
dd if=/tmp/pattern of=$DISK bs=64k seek=64 count=32 conv=notrunc 2>/dev/null
expect "discarded range, written again" "$(checksum 4096 2048)" "$(sum_of 0 2)"
