# fio writes blocks that carry a checksum of themselves, from every processor and so over every queue, and reads them
# back afterwards.
# SIZE_MIB: what each processor writes (8).

jobs=$(nproc)
size=${SIZE_MIB:-8}
[ "$(disk_bytes)" -ge $((jobs * size * 1048576)) ] || fail "the disk is too small for $jobs x $size MiB"
common="--filename=$DISK --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --size=${size}m
    --offset_increment=${size}m --numjobs=$jobs --cpus_allowed=0-$((jobs - 1)) --cpus_allowed_policy=split
    --verify=crc32c --verify_fatal=1 --group_reporting --output-format=terse --terse-version=3 --randseed=4711"
before=$(requests write)
fio --name=write --rw=randwrite --do_verify=1 $common >/tmp/fio.out 2>&1 || fail "fio write: $(cat /tmp/fio.out)"
echo "$jobs x $size MiB written and verified, $(($(requests write) - before)) write requests"
drop_cache
before=$(requests read)
fio --name=write --rw=randwrite --verify_only $common >/tmp/fio.out 2>&1 || fail "fio verify: $(cat /tmp/fio.out)"
reads=$(($(requests read) - before))
[ $reads -gt 0 ] || fail "the second verification read nothing"
echo "verified again from the device, $reads read requests"
