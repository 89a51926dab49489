# Shows the disk as the guest sees it and runs fio against it for a few seconds.
# SECONDS_EACH: length of each fio run (4).

echo "disk: $(disk_bytes) bytes, serial '$(cat $SYS/serial)', $(ls $SYS/mq | wc -l) queue(s), $(nproc) processor(s)"
echo "block size $(cat $SYS/queue/logical_block_size), write cache: $(cat $SYS/queue/write_cache)," \
    "discard granularity $(cat $SYS/queue/discard_granularity)"
lsblk -o NAME,SIZE,RO,TYPE $DISK

run() {
    # Terse: field 8 and 49 are IOPS, 7 and 48 bandwidth in KiB/s; 81 on is the mean completion latency in µs.
    fio --name="$1" --filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --rw="$1" \
        --time_based --runtime="${SECONDS_EACH:-4}" --numjobs="$(nproc)" --group_reporting --norandommap \
        --output-format=terse --terse-version=3 >/tmp/fio.out || fail "fio $1"
    awk -F ';' -v name="$1" '$5 != 0 { exit 1 }
        { read = $8; write = $49; mib = ($7 + $48) / 1024; lat = read > 0 ? $40 : $81
          printf "%-10s %6d IOPS  %7.1f MiB/s  mean latency %.0f us\n", name, read + write, mib, lat }' /tmp/fio.out ||
        fail "fio $1 reports an error: $(cat /tmp/fio.out)"
}
run randread
[ "$READONLY" = 1 ] || run randwrite
