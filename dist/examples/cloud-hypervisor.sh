#!/bin/sh
# A guest of Cloud Hypervisor's on the disk of vublk@web.service; the kernel and the rest come as arguments.
exec cloud-hypervisor --cpus boot=4 --memory size=4G,shared=on \
    --disk vhost_user=true,socket=/run/vublk/web.sock,num_queues=4 "$@"
