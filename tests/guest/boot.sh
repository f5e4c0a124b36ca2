#!/usr/bin/env bash
# Boots the guest that build.sh built, runs a shell script in it, and leaves the console on this terminal:
#
#   boot.sh [--fio] [--cpus N] [--memory SIZE] [--iommu] [--share DIR] [--share-writable DIR] SCRIPT [QEMU OPTIONS...]
#
# --iommu puts one between the guest's memory and its PCI devices. A folder that is shared is in the guest where it is
# here; with /usr the guest has this machine's programs.
#
# The guest powers off when the script ends; its console then says `GUEST-EXIT <the script's exit code>`. Its memory is
# shared, as vhost-user devices need. The processor is always emulated, so that it runs the same on every machine, with
# virtualisation or without. This process becomes QEMU: whoever started it can end it by its process id.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
guest=${CARGO_TARGET_DIR:-$here/../../target}/guest
initrd=$guest/guest.cpio
cpus=2
memory=512M
kernel_options=
machine_options=()
shares=()

# Shares a folder: share DIR ro|rw.
share() {
    local tag=share${#shares[@]} access=
    [ "$2" = rw ] || access=,readonly=on
    machine_options+=(-virtfs "local,path=${1//,/,,},mount_tag=$tag,security_model=none,multidevs=remap$access")
    shares+=("$tag $2 $1")
}

while [ $# -gt 0 ]; do
    case $1 in
        --fio) initrd=$guest/fio.cpio ;;
        --cpus)
            shift
            cpus=$1
            ;;
        --memory)
            shift
            memory=$1
            ;;
        --iommu)
            kernel_options=' intel_iommu=on'
            # In front of all PCI devices, which it then stands between memory and.
            machine_options=(-device intel-iommu,intremap=on,caching-mode=on "${machine_options[@]}")
            ;;
        --share)
            shift
            share "$1" ro
            ;;
        --share-writable)
            shift
            share "$1" rw
            ;;
        *) break ;;
    esac
    shift
done
script=${1:?boot.sh: the script to run in the guest is missing}
shift

"$here/build.sh" --is-built || { echo "boot.sh: the guest is not built (run tests/guest/build.sh)" >&2; exit 2; }

if [ ${#shares[@]} != 0 ]; then
    list=$(printf '%s\n' "${shares[@]}")$'\n'
    machine_options+=(-fw_cfg "name=opt/guest/shares,string=${list//,/,,}")
fi

# rdrand: without a source of randomness libuuid, and with it mke2fs, waits four seconds.
exec qemu-system-x86_64 \
    -accel tcg,thread=multi -machine q35,memory-backend=memory -cpu qemu64,+rdrand -smp "$cpus" -m "$memory" \
    -object "memory-backend-memfd,id=memory,size=$memory,share=on" \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio \
    -kernel "$guest/vmlinux" -initrd "$initrd" -fw_cfg "name=opt/guest/script,file=$script" \
    -append 'console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check'"$kernel_options" \
    "${machine_options[@]}" "$@"
