# Sends requests from each processor and sees that each queue of the disk carried some.

count=$(ls $SYS/mq | wc -l)
# The kernel uses no more queues than there are processors.
wanted=$(nproc)
[ "$QUEUES" -ge "$wanted" ] || wanted=$QUEUES
expect "queues" "$count" "$wanted"

virtio=$(basename "$(readlink -f $SYS/device)")
# Interrupts of queue N so far, all processors together.
interrupts() {
    awk -v name="$virtio-req.$1" '$NF == name { for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i } END { print sum + 0 }' \
        /proc/interrupts
}
queue=0
while [ $queue -lt "$count" ]; do
    eval "before$queue=$(interrupts $queue)"
    queue=$((queue + 1))
done
cpu=0
while [ $cpu -lt "$(nproc)" ]; do
    fio --name=cpu$cpu --filename=$DISK --direct=1 --ioengine=libaio --iodepth=4 --rw=randread --bs=4k --size=4m \
        --io_size=1m --cpus_allowed=$cpu --output-format=terse >/tmp/fio.out 2>&1 || fail "fio: $(cat /tmp/fio.out)"
    cpu=$((cpu + 1))
done
queue=0
while [ $queue -lt "$count" ]; do
    eval "more=\$(( \$(interrupts $queue) - before$queue ))"
    echo "queue $queue: processors $(cat $SYS/mq/$queue/cpu_list), $more interrupts"
    [ $more -gt 0 ] || fail "queue $queue carried nothing"
    queue=$((queue + 1))
done
