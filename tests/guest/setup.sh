#!/usr/bin/env bash
# Installs what the guest tests need on a machine that has only a Rust toolchain, gcc and git: QEMU with its tools,
# fio, a static busybox, cpio, e2fsprogs, and a distribution kernel for the guest (kept under target/guest, the
# machine's own boot files stay untouched).
#
# Called by ./demo and ./check, and by hand. May be called any number of times: with nothing missing it returns at once
# and touches neither apt nor the network. As root it installs; anybody else is told which packages are missing.
# Must not ask questions, and must not let apt remove or downgrade anything.
set -euo pipefail
. "$(dirname "$0")/common.sh"

[ "$(uname -m)" = x86_64 ] || die 1 "the guest tests know x86-64 machines only, this is $(uname -m)"

# ---------------------------------------------------------------- what is missing

# Prints the packages that are still missing, one per line.
missing() {
    have qemu-system-x86_64 || echo qemu-system-x86
    { have qemu-img && have qemu-io && have qemu-nbd && have qemu-storage-daemon; } || echo qemu-utils
    have fio || echo fio
    # A dynamically linked busybox would not run in the initramfs.
    { have busybox && ! ldd "$(command -v busybox)" >/dev/null 2>&1; } || echo busybox-static
    have cpio || echo cpio
    { have mkfs.ext4 && have e2fsck; } || echo e2fsprogs
    { have setpriv && have blkdiscard && have lsblk && have flock; } || echo util-linux
    { have nm && have readelf; } || echo binutils
    perl -MJSON::PP -e 1 2>/dev/null || echo perl
    have xz || echo xz-utils
}
have() { command -v "$1" >/dev/null 2>&1; }
kernel_ready() { [ -e "$STATE/kernel/complete" ]; }

packages=$(missing)
if [ -z "$packages" ] && kernel_ready; then
    exit 0
fi

# Several users of one tree (parallel tests) must not run this at once.
mkdir -p "$STATE"
exec 9>"$STATE/setup.lock"
flock 9
packages=$(missing)

# ---------------------------------------------------------------- packages

apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" </dev/null >&2; }

# Whether this apt-get command line would neither remove nor downgrade anything.
harmless() {
    local plan
    plan=$(LC_ALL=C apt-get -s --no-install-recommends "$@" 2>/dev/null) || return 1
    ! grep -Eq '^Remv|DOWNGRADED' <<<"$plan"
}

release_field() { (. /etc/os-release && printf '%s' "${!1-}"); }

# Debian 12 carries QEMU 7.2, its backports 10.0: the backports are preferred, and needed when the tools already come
# from there (7.2 would remove them). Prints the target release for apt, or nothing.
add_backports() {
    [ "$(release_field ID)" = debian ] && [ "$(release_field VERSION_CODENAME)" = bookworm ] || return 0
    if ! apt-cache policy 2>/dev/null | grep -q 'a=[a-z-]*backports,n=bookworm-backports'; then
        local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg file
        mirror=$(sed -nE 's/^(URIs:|deb( \[[^]]*\])?) *([a-z+]+:[^ ]*\/debian\/?)( .*)?$/\3/p' \
            /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null | head -n 1)
        file=/etc/apt/sources.list.d/ringblk-backports.sources
        {
            echo "# Written by ringblk's tests/guest/setup.sh: QEMU newer than 7.2."
            echo "Types: deb"
            echo "URIs: ${mirror:-http://deb.debian.org/debian}"
            echo "Suites: bookworm-backports"
            echo "Components: main"
            [ ! -e "$keyring" ] || echo "Signed-By: $keyring"
        } >"$file"
        if ! apt update; then
            rm -f "$file"
            return 0
        fi
    fi
    echo bookworm-backports
}

install_packages() {
    local list="$1" backports
    apt update || say "apt-get update failed, going on with the package lists at hand"
    if grep -q '^qemu' <<<"$list"; then
        # The emulator and the tools have to come from one version: asking for both keeps apt from choosing two.
        list=$(printf '%s\nqemu-system-x86\nqemu-utils\n' "$list" | sort -u)
        backports=$(add_backports)
        # shellcheck disable=SC2086 # a list of words
        if [ -n "$backports" ] && harmless install -t "$backports" $list; then
            apt install --no-install-recommends -t "$backports" $list
            return
        fi
    fi
    # shellcheck disable=SC2086
    harmless install $list || die 1 "apt cannot install these without removing others, please do it by hand:" $list
    # shellcheck disable=SC2086
    apt install --no-install-recommends $list
}

if [ -n "$packages" ]; then
    if ! have apt-get; then
        die 1 "this machine has no apt; please install what these Debian packages contain:" $packages
    fi
    if [ "$(id -u)" != 0 ]; then
        die 1 "these packages are missing, install them or run this script as root:" $packages
    fi
    say "installing:" $packages
    install_packages "$packages"
    # Some releases keep the storage daemon in a package of its own.
    if ! have qemu-storage-daemon && apt-cache show qemu-storage-daemon >/dev/null 2>&1; then
        apt install --no-install-recommends qemu-storage-daemon
    fi
    packages=$(missing)
    [ -z "$packages" ] || die 1 "still missing after the installation:" $packages
fi

# ---------------------------------------------------------------- the guest's kernel

# What an initramfs may need of a kernel package; most of it is built in with some kernels.
WANTED=('*/boot/vmlinuz-*' '*/modules.builtin' '*/virtio*.ko*' '*/fs/ext4/*' '*/fs/jbd2/*' '*/fs/mbcache.ko*'
    '*/crc16.ko*' '*/libcrc32c.ko*' '*/crc32c_generic.ko*')

# Downloads the newest kernel package and the packages with its modules, without installing them, and unpacks the
# few files that matter into the directory given.
download_kernel() {
    local into=$1 meta image deb
    have apt-get && have dpkg-deb || return 1
    for meta in linux-image-cloud-amd64 linux-image-virtual linux-image-amd64 linux-image-generic; do
        # A meta package names the real one; never the installer's or an unsigned one.
        image=$(LC_ALL=C apt-cache depends "$meta" 2>/dev/null |
            sed -nE 's/^ *Depends: (linux-image-[0-9][^ ]*)$/\1/p' | head -n 1)
        [ -z "$image" ] || break
    done
    [ -n "$image" ] || return 1
    mkdir "$into/deb" "$into/tree"
    (
        cd "$into/deb"
        # Ubuntu ships the modules separately.
        LC_ALL=C apt-cache depends "$image" | sed -nE 's/^ *Depends: (linux-modules-[0-9][^ ]*)$/\1/p' >modules
        # shellcheck disable=SC2046
        apt-get -q download "$image" $(cat modules) >&2 2>/dev/null
    ) || return 1
    for deb in "$into"/deb/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$into/tree" --wildcards "${WANTED[@]}" 2>/dev/null || true
    done
}

# The machine's own kernel, when it left readable files behind: good enough without a network.
copy_kernel() {
    local into=$1 image version
    for image in $(ls -1 /boot/vmlinuz-* 2>/dev/null | sort -rV); do
        version=${image#/boot/vmlinuz-}
        [ -r "$image" ] && [ -d "/lib/modules/$version" ] || continue
        mkdir -p "$into/tree/boot"
        cp "$image" "$into/tree/boot/"
        tar -c -C / --dereference "lib/modules/$version/kernel" "lib/modules/$version/modules.builtin" 2>/dev/null |
            tar -x -C "$into/tree" --wildcards "${WANTED[@]}" 2>/dev/null || true
        return 0
    done
    return 1
}

fetch_kernel() {
    local work="$STATE/kernel.new"
    rm -rf "$work"
    mkdir -p "$work"
    if ! download_kernel "$work"; then
        rm -rf "$work"/*
        if [ "$(id -u)" = 0 ] && have apt-get && apt update && download_kernel "$work"; then
            :
        else
            rm -rf "$work"/*
            copy_kernel "$work" || die 1 "no kernel for the guest: apt offers none and /boot holds none that is readable"
        fi
    fi
    local image modules
    image=$(find "$work/tree" -name 'vmlinuz-*' -type f | sort -V | tail -n 1)
    modules=$(find "$work/tree" -name modules.builtin | sort -V | tail -n 1)
    [ -n "$image" ] && [ -n "$modules" ] || die 1 "the kernel package holds no kernel, or no modules"
    mv "$image" "$work/vmlinuz"
    mv "$(dirname "$modules")" "$work/modules"
    basename "${image##*/vmlinuz-}" >"$work/complete"
    rm -rf "$work/deb" "$work/tree" "$STATE/kernel"
    mv "$work" "$STATE/kernel"
    say "guest kernel $(cat "$STATE/kernel/complete")"
}

kernel_ready || fetch_kernel
