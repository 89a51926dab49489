#!/usr/bin/env bash
# initramfs.sh OUT: writes the guest's initramfs to OUT: a static busybox, fio, e2fsprogs, the virtio modules of the
# guest's kernel, and init.sh. The result is kept under target/guest, named by a hash of everything it is made of.
#
# Called by boot.sh, which appends the script of one run as a second archive; so nothing of one run belongs in here.
set -euo pipefail
. "$(dirname "$0")/common.sh"

[ $# = 1 ] || die 2 "usage: initramfs.sh OUT"
[ -e "$STATE/kernel/complete" ] || die 125 "the guest's kernel is missing, run tests/guest/setup.sh"

TOOLS=(busybox fio mkfs.ext4 e2fsck blkdiscard blockdev lsblk)
paths=()
for tool in "${TOOLS[@]}"; do
    paths+=("$(command -v "$tool")") || die 125 "$tool is missing, run tests/guest/setup.sh"
done
# In the order in which they are loaded: the drivers first, then what may be a module in some kernels.
MODULES=(virtio_pci virtio_blk virtio_console crc32c_generic ext4)

# The binaries are named by size and time: hashing their content would take longer than the rest.
key=$({
    cat "$HERE/initramfs.sh" "$HERE/init.sh" "$HERE/lib.sh"
    stat -L -c '%n %s %Y' "${paths[@]}" "$STATE/kernel/complete"
} | sha256sum | cut -c 1-16)
cached="$STATE/initramfs-$key.cpio"

# The libraries of a program, as paths; none for a static one.
libraries() { ldd "$1" 2>/dev/null | grep -oE "/[^ )]+" || true; }

# Copies a program with the libraries that it names, at the paths where its loader looks for them.
copy_program() {
    local library
    install -D -m 755 "$1" "$root/bin/$(basename "$1")"
    libraries "$1" | while read -r library; do
        [ -e "$root$library" ] || install -D -m 755 "$library" "$root$library"
    done
}

# Distributions link fio to the clients of every storage cluster there is, 80 MB that only slow the boot down. The
# libraries that local disks need are kept, each other one is replaced by an empty shell: one of them defines all the
# functions (none is ever called), all define the symbol versions that the loader asks for.
# Returns non-zero when that did not lead to a fio that works.
copy_fio_slim() {
    local fio=$1 keep='^lib(c|m|z|dl|rt|pthread|numa|aio|gcc_s)\.so|^ld-' name path library shells="$work/shells" first=1
    local args
    command -v gcc >/dev/null && command -v nm >/dev/null && command -v readelf >/dev/null || return 1
    install -D -m 755 "$fio" "$root/bin/fio"
    mkdir -p "$shells"
    : >"$work/kept.symbols"
    # What fio names itself, and only that: a shell needs no libraries.
    while read -r name; do
        [[ $name =~ $keep ]] || continue
        path=$(ldd "$fio" | awk -v n="$name" '$1 == n { print $3 }')
        # A kept library may need others of its own.
        for library in "$path" $(libraries "$path"); do
            [ -e "$root$library" ] || install -D -m 755 "$library" "$root$library"
            nm -D --defined-only "$library" | awk '{ sub(/@.*/, "", $NF); print $NF }' >>"$work/kept.symbols"
        done
    done < <(needed "$fio")
    sort -u -o "$work/kept.symbols" "$work/kept.symbols"
    nm -D --undefined-only "$fio" | awk '$1 == "U" { sub(/@.*/, "", $2); print $2 }' | sort -u |
        comm -23 - "$work/kept.symbols" | awk '{ print "void " $1 "(void) { __builtin_trap(); }" }' >"$work/all.c"
    : >"$work/none.c"
    while read -r name; do
        [[ ! $name =~ $keep ]] || continue
        # "Version needs" of this library, as version nodes of the shell.
        readelf -W -V "$fio" | awk -v n="$name" '
            / File: / { here = ($0 ~ ("File: " n " ")) ; next }
            here && /Name: / { sub(/.*Name: /, ""); print $1 " { };" }' >"$work/versions"
        args=()
        [ ! -s "$work/versions" ] || args=(-Wl,--version-script="$work/versions")
        # The functions go into a shell without versions: such a one answers to any version asked for.
        if [ -z "${args[*]}" ] && [ "$first" = 1 ]; then
            first=0
            gcc -w -shared -fPIC -nostdlib -fno-builtin -Wl,-soname,"$name" -o "$shells/$name" "$work/all.c" || return 1
        else
            gcc -shared -fPIC -nostdlib -Wl,-soname,"$name" "${args[@]}" -o "$shells/$name" "$work/none.c" || return 1
        fi
    done < <(needed "$fio")
    [ "$first" = 0 ] || [ ! -s "$work/all.c" ] || return 1
    # The proof, on this machine: it starts without a complaint and does I/O.
    LD_LIBRARY_PATH=$shells "$fio" --name=try --ioengine=psync --rw=write --size=64k --filename="$work/try" \
        >/dev/null 2>"$work/try.err" || return 1
    [ ! -s "$work/try.err" ] || return 1
    # Nothing else in the initramfs uses what they stand for: they lie where fio's loader looks anyway.
    install -D -m 755 -t "$root$(dirname "$path")" "$shells"/*
}

needed() { readelf -W -d "$1" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p'; }

# Puts a module with what it depends on into the list of what init loads, dependencies first.
add_module() {
    local name=${1//-/_} file dependency plain
    ! grep -qx "$name" "$work/modules" || return 0
    file=$(find "$STATE/kernel/modules" -name '*.ko*' |
        awk -v n="$name" '{ f = $0; sub(/.*\//, "", f); sub(/\.ko.*/, "", f); gsub(/-/, "_", f); if (f == n) print }' | head -n 1)
    if [ -z "$file" ]; then
        # Built in, or not known to this kernel: init complains when a driver turns out to be missing.
        return 0
    fi
    plain="$root/modules/$name.ko"
    case $file in
        *.ko) cp "$file" "$plain" ;;
        *.ko.xz) xz -dc "$file" >"$plain" ;;
        *.ko.zst) zstd -q -dc "$file" >"$plain" ;;
        *.ko.gz) gzip -dc "$file" >"$plain" ;;
    esac
    for dependency in $(tr '\0' '\n' <"$plain" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "$dependency"
    done
    echo "$name" >>"$work/modules"
}

build() {
    work=$(mktemp -d "$STATE/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    root="$work/root"
    mkdir -p "$root"/{bin,dev,lib,mnt,modules,proc,run,sys,tmp}
    local path
    for path in "${paths[@]}"; do
        case $(basename "$path") in
            fio)
                if ! copy_fio_slim "$path"; then
                    say "fio goes in with all its libraries"
                    rm -f "$root/bin/fio"
                    copy_program "$path"
                fi
                ;;
            *) copy_program "$path" ;;
        esac
    done
    : >"$work/modules"
    local module
    for module in "${MODULES[@]}"; do
        add_module "$module"
    done
    cp "$work/modules" "$root/modules/order"
    install -m 755 "$HERE/init.sh" "$root/init"
    install -m 644 "$HERE/lib.sh" "$root/lib/lib.sh"
    # Not compressed: unpacking costs an emulated processor more than reading.
    (cd "$root" && find . -print0 | sort -z | cpio --quiet -o0 -H newc -R 0:0) >"$work/out.cpio"
    # Old ones go, this one appears at once: parallel runs see none or a whole one.
    find "$STATE" -maxdepth 1 -name 'initramfs-*.cpio' -mmin +60 -delete
    mv "$work/out.cpio" "$cached"
}

if [ ! -e "$cached" ]; then
    exec 9>"$STATE/initramfs.lock"
    flock 9
    [ -e "$cached" ] || build
fi
cp "$cached" "$1"
