# The write cache as the device presents it: shown, turned off, turned on again, with synchronising traffic each time.
# The kernel sends flushes exactly when it believes that there is a cache.
# WRITE_CACHE: what has to be seen at first, "write back" or "write through" (anything).

first=$(cat $SYS/queue/write_cache)
echo "write cache at first: $first"
[ -z "${WRITE_CACHE-}" ] || expect "write cache" "$first" "$WRITE_CACHE"

traffic() {
    flushes=$(requests flush)
    fio --name=sync --filename=$DISK --direct=1 --ioengine=psync --rw=randwrite --bs=4k --size=1m --io_size=256k \
        --fdatasync=1 --output-format=terse >/tmp/fio.out 2>&1 || fail "fio: $(cat /tmp/fio.out)"
    flushes=$(($(requests flush) - flushes))
    echo "$1: $flushes flush requests for 64 synchronised writes"
    case $1 in
        'write back') [ $flushes -ge 60 ] || fail "the kernel flushes too little" ;;
        'write through') [ $flushes -eq 0 ] || fail "the kernel flushes a cache that is not there" ;;
    esac
}
traffic "$first"
for mode in "write through" "write back" "$first"; do
    echo "$mode" >$SYS/cache_type 2>/tmp/error || fail "the device does not let the guest choose: $(cat /tmp/error)"
    expect "write cache after the choice" "$(cat $SYS/queue/write_cache)" "$mode"
    traffic "$mode"
done
