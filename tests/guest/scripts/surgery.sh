# fio with verification from every processor, and so over every queue, again and again, while the host changes the graph
# below the disk. The guest asks "surgery" once the load runs; the host operates and answers "ok". Then the load ends, and
# what it wrote last is read once more.
# SIZE_MIB: what each processor writes (4).

jobs=$(nproc)
size=${SIZE_MIB:-4}
[ "$(disk_bytes)" -ge $((jobs * size * 1048576)) ] || fail "the disk is too small for $jobs x $size MiB"
common="--filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --size=${size}m
    --offset_increment=${size}m --numjobs=$jobs --cpus_allowed=0-$((jobs - 1)) --cpus_allowed_policy=split
    --verify=crc32c --verify_fatal=1 --group_reporting --output-format=terse --terse-version=3"
rm -f /tmp/stop /tmp/bad
(
    pass=0
    while [ ! -e /tmp/stop ]; do
        pass=$((pass + 1))
        fio --name=write --rw=randwrite --do_verify=1 --randseed=$pass $common >/tmp/fio.out 2>&1 || {
            echo "pass $pass" >/tmp/bad
            break
        }
        echo $pass >/tmp/passes
    done
) &
load=$!
begun() { [ -e /tmp/passes ] || [ -e /tmp/bad ]; }
wait_until 120 begun || fail "the load has not begun"
[ ! -e /tmp/bad ] || fail "fio: $(cat /tmp/fio.out)"
before=$(requests write)
answer=$(ask_host surgery) || fail "$answer"
echo "under surgery: $(($(requests write) - before)) write requests"
touch /tmp/stop
wait $load
[ ! -e /tmp/bad ] || fail "fio, $(cat /tmp/bad): $(cat /tmp/fio.out)"
passes=$(cat /tmp/passes)
drop_cache
fio --name=write --rw=randwrite --verify_only --randseed=$passes $common >/tmp/fio.out 2>&1 ||
    fail "fio verify: $(cat /tmp/fio.out)"
echo "$passes passes written and verified"
