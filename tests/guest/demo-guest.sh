# What the demo's guest does with its disk. Each `word value` line is picked up by demo.sh.
set -e

uptime_s() {
    cut -d' ' -f1 /proc/uptime
}

# Seconds since a moment: since MOMENT.
since() {
    awk -v from="$1" '{ printf "%.2f", $1 - from }' /proc/uptime
}

# MB per second: rate MEBIBYTES SECONDS.
rate() {
    awk -v mib="$1" -v s="$2" 'BEGIN { printf "%.0f MB/s", mib * 1.048576 / s }'
}

files=32
mib=64
queue=/sys/block/vda/queue
echo "kernel Linux $(uname -r)"
echo "sees /dev/vda, $(($(cat /sys/block/vda/size) / 2048)) MiB," \
    "$(ls /sys/block/vda/mq | wc -l) queues, $(cat $queue/write_cache)," \
    "discard $([ "$(cat $queue/discard_max_bytes)" = 0 ] && echo no || echo yes)"

start=$(uptime_s)
mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
echo "mkfs $(since "$start")"

# Made and summed in memory first, so that the sums cannot come from the disk.
mkdir /tmp/files
for i in $(seq $files); do
    dd if=/dev/urandom of=/tmp/files/$i bs=1M count=$((mib / files)) 2>/dev/null
done
(cd /tmp/files && sha256sum *) >/tmp/sums

start=$(uptime_s)
cp /tmp/files/* /mnt/
sync
took=$(since "$start")
echo "wrote $files files, $mib MiB, and synced in $took s ($(rate $mib "$took"))"

umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt
start=$(uptime_s)
cat /mnt/[0-9]* >/dev/null
took=$(since "$start")
(cd /mnt && sha256sum -c /tmp/sums >/tmp/checked) || { cat /tmp/checked; exit 1; }
echo "read $(grep -c ': OK$' /tmp/checked) files back after a remount in $took s ($(rate $mib "$took")); every SHA-256 matches"
umount /mnt

# Fields of the block layer's stat file: completed reads 1, writes 5, discards 12, flushes 16.
awk '{ print "requests " $1 " reads, " $5 " writes, " $12 " discards, " $16 " flushes" }' /sys/block/vda/stat
