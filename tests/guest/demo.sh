#!/usr/bin/env bash
# The demo: a fresh raw disk, vublk serving it, and a real Linux guest that works on it. Every step that fails ends the
# demo with one line, the guest's console and the daemon's messages. Expects `cargo build --release` and tests/setup.sh.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
vublk=$target/release/vublk
size_mib=1024
boot_limit_s=180

# The disk lies beside what cargo builds: the system's temporary folder may know no O_DIRECT.
dir=$(mktemp -d)
disk_dir=$(mktemp -d "$target/demo.XXXXXX")
disk=$disk_dir/disk.img
socket=$dir/disk.sock
daemon=

clean_up() {
    [ -z "$daemon" ] || kill -9 "$daemon" 2>/dev/null || true
    rm -rf "$dir" "$disk_dir"
}
trap clean_up EXIT

say() {
    printf '%-10s %s\n' "$1" "$2"
}

fail() {
    echo "demo: $*" >&2
    for log in console daemon.log; do
        [ ! -s "$dir/$log" ] || sed "s/^/    $log: /" "$dir/$log" >&2
    done
    exit 1
}

milliseconds() {
    date +%s%3N
}

# The value behind a word on the guest's console: told WORD.
told() {
    sed -n "s/^$1 //p" "$dir/console"
}

start_daemon() {
    "$vublk" serve -f raw "$disk" --socket "$socket" >"$dir/daemon.log" 2>&1 &
    daemon=$!
    for _ in $(seq 200); do
        [ ! -S "$socket" ] || return 0
        kill -0 "$daemon" 2>/dev/null || break
        sleep 0.05
    done
    fail "the daemon did not open its socket"
}

[ -x "$vublk" ] || fail "$vublk is missing: run cargo build --release"

"$vublk" create -f raw "$disk" "${size_mib}M" >"$dir/daemon.log" 2>&1 || fail "vublk create failed"
say disk "raw, $size_mib MiB, of which $(du -k "$disk" | cut -f1) KiB are allocated on the host"

began=$(milliseconds)
start_daemon
say daemon "$("$vublk" --version) serves it over vhost-user-blk; the socket stood after $(($(milliseconds) - began)) ms"

began=$(milliseconds)
timeout --foreground "$boot_limit_s" "$here/boot.sh" "$here/demo-guest.sh" \
    -chardev "socket,id=disk,path=$socket" -device vhost-user-blk-pci,chardev=disk \
    </dev/null >"$dir/serial" 2>&1 || { tr -d '\r' <"$dir/serial" >"$dir/console"; fail "QEMU failed"; }
whole=$(($(milliseconds) - began))
tr -d '\r' <"$dir/serial" >"$dir/console"
[ "$(told GUEST-EXIT)" = 0 ] || fail "the guest's work failed"

say guest "$(told kernel), booted by QEMU without virtualisation in $(told GUEST-UP) s"
say sees "$(told sees)"
say mkfs "ext4 made in $(told mkfs) s and mounted"
say wrote "$(told wrote)"
say read "$(told read)"
say requests "$(told requests)"
say off "unmounted and powered off; $((whole / 1000)).$((whole % 1000 / 100)) s in all"

kill "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
[ "$status" = 0 ] || fail "the daemon was asked to end and ended with $status (wanted 0)"
[ ! -e "$socket" ] || fail "the daemon left its socket behind"
say daemon "ended on SIGTERM, its socket is gone"

e2fsck -fn "$disk" >"$dir/console" 2>&1 || fail "e2fsck finds the image damaged"
say image "e2fsck on the host: clean; $(du -m "$disk" | cut -f1) MiB are now allocated"
echo "The demo worked."
