# A file system lives on the disk: made, filled, unmounted, mounted again, compared and checked.
# COUNT: number of files (32).

mkfs.ext4 -q -F -E nodiscard $DISK || fail "mkfs.ext4"
mkdir -p /mnt/disk
mount -t ext4 $DISK /mnt/disk || fail "mount"
i=0
while [ $i -lt "${COUNT:-32}" ]; do
    # Sizes from a few bytes to half a megabyte, so that files end everywhere in a block.
    head -c $((i * 16411 + 7)) /dev/urandom >/mnt/disk/file$i
    i=$((i + 1))
done
mkdir /mnt/disk/deep
ln -s ../file1 /mnt/disk/deep/link
(cd /mnt/disk && sha256sum file*) >/tmp/sums
sync
umount /mnt/disk || fail "umount"
drop_cache

mount -t ext4 $DISK /mnt/disk || fail "second mount"
(cd /mnt/disk && sha256sum -c /tmp/sums >/tmp/checked) || fail "content differs: $(grep -v OK /tmp/checked)"
echo "$(grep -c OK /tmp/checked) files are as they were written, $(du -sk /mnt/disk | cut -f 1) KiB"
# Removal and a second generation of files: blocks are used again.
rm /mnt/disk/file1*
head -c 1000000 /dev/urandom >/mnt/disk/again
sum=$(sha256sum </mnt/disk/again)
umount /mnt/disk
drop_cache
mount -t ext4 -o ro $DISK /mnt/disk
expect "checksum of a rewritten file" "$(sha256sum </mnt/disk/again)" "$sum"
umount /mnt/disk
e2fsck -f -n $DISK >/tmp/fsck 2>&1 || fail "e2fsck: $(cat /tmp/fsck)"
echo "e2fsck finds no fault"
