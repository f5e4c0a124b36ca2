#!/usr/bin/env bash
# Builds the Linux guest that the demo and the guest tests boot, in target/guest:
#
#   vmlinux      the kernel of Debian's linux-image-amd64, unpacked (under emulation that halves the boot)
#   guest.cpio   initramfs: busybox, dash, ext4 and disk tools, the kernel modules they need, init
#   fio.cpio     the same and fio (whose libraries are ten times the rest, so only guests that need it carry it)
#
# What is built stays until this folder's build.sh or init changes. `--is-built` only tells (by its exit code) whether
# it is; several builds at once wait for each other.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(cd "$(dirname "$0")" && pwd)
out=${CARGO_TARGET_DIR:-$here/../../target}/guest
programs=(dash mke2fs e2fsck dumpe2fs blkdiscard fstrim blockdev)
modules=(virtio_pci virtio_blk ext4 crc32c_generic qemu_fw_cfg 9p 9pnet_virtio nvme vfio-pci vfio_iommu_type1 dm_mod)

fail() {
    echo "guest: $*" >&2
    exit 1
}

# 4, 2 or 1 bytes of a file as a little-endian number: number FILE OFFSET BYTES.
number() {
    od -An -tu"$3" --endian=little -j "$2" -N "$3" "$1" | tr -d ' '
}

# Unpacks the ELF kernel inside a bzImage: unpack_kernel VMLINUZ VMLINUX. The header fields are those of the Linux x86
# boot protocol (setup_sects, payload_offset, payload_length); the payload's own first bytes tell how it is packed.
unpack_kernel() {
    local start length packed=$2.packed
    start=$((($(number "$1" $((0x1f1)) 1) + 1) * 512 + $(number "$1" $((0x248)) 4)))
    length=$(number "$1" $((0x24c)) 4)
    tail -c +$((start + 1)) "$1" >"$packed.rest"
    head -c "$length" "$packed.rest" >"$packed"
    rm "$packed.rest"
    # All packings but gzip are followed by four bytes that tell the unpacked size.
    case $(od -An -tx1 -N 4 "$packed" | tr -d ' ') in
        fd377a58) head -c -4 "$packed" | xz -dc >"$2" ;;
        28b52ffd) head -c -4 "$packed" | zstd -dcq >"$2" ;;
        1f8b*) gzip -dc <"$packed" >"$2" ;;
        *) fail "$1: the kernel is packed in a way that is not known here (wanted xz, zstd or gzip)" ;;
    esac
    rm "$packed"
    [ "$(head -c 4 "$2" | tail -c 3)" = ELF ] || fail "$1: what was unpacked is no ELF file"
}

# Copies a program and the libraries it is linked with into a tree: add_program TREE NAME.
add_program() {
    local path library
    path=$(command -v "$2") || fail "$2 is not installed (run tests/setup.sh)"
    cp -L "$path" "$1/usr/bin/"
    for library in $(ldd "$path" | grep -oE '/[^ ]+'); do
        mkdir -p "$1$(dirname "$library")"
        cp -Ln "$library" "$1$library"
    done
}

# Copies the modules of the list and all they depend on: add_modules TREE KERNEL_PACKAGE RELEASE.
add_modules() {
    local module file from=$2/lib/modules/$3 to=$1/lib/modules/$3
    mkdir -p "$to"
    cp "$from"/modules.{builtin,builtin.modinfo,order} "$to/"
    for module in "${modules[@]}"; do
        for file in $(modprobe -d "$2" -S "$3" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'); do
            mkdir -p "$to/$(dirname "${file#"$from"/}")"
            cp -n "$file" "$to/${file#"$from"/}"
        done
    done
    depmod -b "$1" "$3"
}

pack() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --null --create --format=newc --owner=0:0 --quiet) >"$2"
}

build() {
    local work=$1 package release tree=$1/tree applet
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends:/ { print $2; exit }')
    [ -n "$package" ] || fail "apt knows no linux-image-amd64 (run tests/setup.sh, which refreshes the package lists)"
    echo "guest: building from $package"
    (cd "$work" && apt-get -qq -o Acquire::Retries=3 download "$package") >"$work/log" 2>&1 ||
        { cat "$work/log" >&2; fail "apt-get download $package failed (its output is above)"; }
    dpkg -x "$work"/linux-image-*.deb "$work/kernel"
    # Debian 13 has the modules in /usr/lib, and depmod and modprobe look for them in /lib.
    [ -e "$work/kernel/lib" ] || ln -s usr/lib "$work/kernel/lib"
    release=${package#linux-image-}
    unpack_kernel "$work/kernel/boot/vmlinuz-$release" "$work/vmlinux"
    depmod -b "$work/kernel" "$release"

    mkdir -p "$tree"/{bin,sbin,usr/bin,etc,proc,sys,dev,tmp,mnt,root,run}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"
    done
    ln -s /bin/busybox "$tree/sbin/modprobe" # where the kernel itself looks for it
    for program in "${programs[@]}"; do
        add_program "$tree" "$program"
    done
    # busybox's own shell prefers its applets to the programs in PATH; dash does not.
    ln -sf /usr/bin/dash "$tree/bin/sh"
    add_modules "$tree" "$work/kernel" "$release"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$tree/etc/passwd"
    ln -s /proc/self/mounts "$tree/etc/mtab"
    cp /etc/mke2fs.conf "$tree/etc/" # without it mke2fs makes another kind of ext4
    install -m 755 "$here/init" "$tree/init"
    pack "$tree" "$work/guest.cpio"
    add_program "$tree" fio
    pack "$tree" "$work/fio.cpio"

    mv "$work"/{vmlinux,guest.cpio,fio.cpio} "$out/"
    echo "$recipe" >"$out/recipe"
}

recipe=$(cat "$here/build.sh" "$here/init" | sha256sum)
if [ -e "$out/recipe" ] && [ "$(cat "$out/recipe")" = "$recipe" ]; then
    exit 0
fi
[ "${1-}" != --is-built ] || exit 1

mkdir -p "$out"
exec 9>"$out/lock"
flock 9
# Another build may have done it while this one waited.
if [ "$(cat "$out/recipe" 2>/dev/null)" != "$recipe" ]; then
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    build "$work"
fi
