# The guest of the soak: loads that write and verify for as long as it lives, and between them a shell for the host,
# which sends `ID COMMAND` and is answered `DONE ID EXIT-CODE LAST-LINE`. Ends, with the loads, at `0 stop`.
dmesg -n 1
echo online_movable >/sys/devices/system/memory/auto_online_blocks

# Runs a fio job again and again: load NAME DEVICE OPTIONS...
load() {
    name=$1 device=$2
    shift 2
    until [ -e /tmp/stop ]; do
        fio --name="$name" --filename="$device" "$@" --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 \
            --randrepeat=0 --eta=never --output="/tmp/fio.$name" 2>&1 || {
            echo "FAILED $name"
            cat "/tmp/fio.$name"
            return 1
        }
        echo "ROUND $name"
    done
}

sum() { dd if="$1" bs=1M iflag=direct $2 2>/dev/null | sha256sum | cut -d' ' -f1; }

# The last blocks are written once and stay: more than a round must not touch them.
dd if=/dev/urandom of=/dev/vda bs=1M seek=48 count=16 oflag=direct 2>/dev/null
kept=$(sum /dev/vda 'skip=48')

load four /dev/vda --size=12m --offset_increment=12m --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split \
    --rw=randwrite --bsrange=512-128k --blockalign=512 --iodepth=16 --fsync=64 --loops=2 &
loads=$!
load mixed /dev/vdb --size=32m --rw=randwrite --bsrange=4k-64k --iodepth=32 --verify_backlog=48 &
loads="$loads $!"

echo READY
while read -r id command; do
    [ "$command" != stop ] || break
    said=$(eval "$command" 2>&1 </dev/null)
    echo "DONE $id $? $(echo "$said" | tail -n 1)"
done

touch /tmp/stop
for one in $loads; do
    wait "$one" || exit 1
done
[ "$(sum /dev/vda 'skip=48')" = "$kept" ] || { echo "FAILED kept"; exit 1; }
dmesg | grep -E 'I/O error|is not a head|hung_task|blocked for more|BUG:|Oops|Call Trace' | sed 's/^/FAILED /'
echo "SUM vda $(sum /dev/vda)"
echo "SUM vdb $(sum /dev/vdb)"
