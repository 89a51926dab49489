# The backend goes away under load and comes back, as often as the host likes; no request may fail, none may be lost or
# done out of place. Boot with --reconnect and --channel: the guest says "outage", the host kills the backend, starts it
# again and answers "ok".
# ROUNDS: number of outages (2). SIZE_MIB: what each processor writes in one round (8).

jobs=$(nproc)
size=${SIZE_MIB:-8}
round=0
while [ $round -lt "${ROUNDS:-2}" ]; do
    round=$((round + 1))
    common="--filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --size=${size}m
        --offset_increment=${size}m --numjobs=$jobs --cpus_allowed=0-$((jobs - 1)) --cpus_allowed_policy=split
        --verify=crc32c --verify_fatal=1 --group_reporting --output-format=terse --randseed=$round"
    before=$(requests write)
    rm -f /tmp/status /tmp/read.status
    # Readers at full depth, so that requests of every queue are in flight at the moment of the outage: were one lost,
    # fio would wait for it for ever.
    {
        status=0
        fio --name=read --filename=$DISK --direct=1 --ioengine=libaio --iodepth=32 --bs=4k --rw=randread --numjobs=$jobs \
            --cpus_allowed=0-$((jobs - 1)) --cpus_allowed_policy=split --time_based --runtime=6 --group_reporting \
            --norandommap --output-format=terse >/tmp/read.out 2>&1 || status=$?
        echo $status >/tmp/read.status
    } &
    {
        # Slow enough to be caught in the middle by the host.
        status=0
        fio --name=write --rw=randwrite --do_verify=0 --rate_iops=1000 $common >/tmp/fio.out 2>&1 || status=$?
        echo $status >/tmp/status
    } &
    running() { [ "$(requests write)" -gt $((before + 200)) ]; }
    wait_until 30 running || fail "fio does not start: $(cat /tmp/fio.out)"
    answer=$(ask_host outage) || fail "$answer"
    [ ! -e /tmp/status ] || echo "note: fio had ended before the backend was back"
    finished() { [ -s /tmp/status ] && [ -s /tmp/read.status ]; }
    wait_until 60 finished || fail "requests hang after the outage: $(cat $SYS/inflight) in flight (reads, writes)"
    [ "$(cat /tmp/status)" = 0 ] || fail "fio write: $(cat /tmp/fio.out)"
    [ "$(cat /tmp/read.status)" = 0 ] || fail "fio read: $(cat /tmp/read.out)"
    drop_cache
    fio --name=write --rw=randwrite --verify_only $common >/tmp/fio.out 2>&1 || fail "fio verify: $(cat /tmp/fio.out)"
    echo "outage $round: $(($(requests write) - before)) write requests, all content verified"
done
