# The host resizes the disk while the guest runs. The guest asks "resize" over the channel; the host resizes and answers
# "ok BYTES" with the new size.
# Rounds come from the host: with ROUNDS=2 it can grow and then shrink (1).

round=0
while [ $round -lt "${ROUNDS:-1}" ]; do
    round=$((round + 1))
    echo "size: $(disk_bytes) bytes"
    answer=$(ask_host resize) || fail "$answer"
    wanted=${answer#ok }
    [ "$wanted" -gt 0 ] 2>/dev/null || fail "the host answers '$answer', not 'ok BYTES'"
    grown() { [ "$(disk_bytes)" = "$wanted" ]; }
    wait_until 20 grown || fail "the guest still sees $(disk_bytes) bytes, not $wanted"
    echo "size: $(disk_bytes) bytes"
    # The last MiB of the new size really is there.
    last=$((wanted / 1024 - 1024))
    pattern resize$round 1048576 >/tmp/pattern
    dd if=/tmp/pattern of=$DISK bs=1k seek=$last conv=notrunc 2>/tmp/dd || fail "write at the new end: $(cat /tmp/dd)"
    expect "last MiB" "$(checksum $last 1024)" "$(sha256sum </tmp/pattern | cut -d ' ' -f 1)"
done
