#!/usr/bin/env bash
# Boots the guest that build.sh built, runs a shell script in it, and leaves the console on this terminal:
#
#   boot.sh [--fio] [--cpus N] SCRIPT [QEMU OPTIONS...]
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

while [ $# -gt 0 ]; do
    case $1 in
        --fio) initrd=$guest/fio.cpio ;;
        --cpus)
            shift
            cpus=$1
            ;;
        *) break ;;
    esac
    shift
done
script=${1:?boot.sh: the script to run in the guest is missing}
shift

"$here/build.sh" --is-built || { echo "boot.sh: the guest is not built (run tests/guest/build.sh)" >&2; exit 2; }

# rdrand: without a source of randomness libuuid, and with it mke2fs, waits four seconds.
exec qemu-system-x86_64 \
    -accel tcg,thread=multi -machine q35,memory-backend=memory -cpu qemu64,+rdrand -smp "$cpus" -m "$memory" \
    -object "memory-backend-memfd,id=memory,size=$memory,share=on" \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio \
    -kernel "$guest/vmlinux" -initrd "$initrd" -fw_cfg "name=opt/guest/script,file=$script" \
    -append 'console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check' \
    "$@"
