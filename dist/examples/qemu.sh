#!/bin/sh
# A guest of QEMU's on the disk of vublk@web.service. Its memory must be shared; after a restart of the service QEMU
# connects again.
exec qemu-system-x86_64 -accel kvm -cpu host -smp 4 -m 4G \
    -object memory-backend-memfd,id=mem,size=4G,share=on -machine memory-backend=mem \
    -chardev socket,id=disk,path=/run/vublk/web.sock,reconnect=1 \
    -device vhost-user-blk-pci,chardev=disk,num-queues=4 "$@"
