#!/usr/bin/env bash
# Installs what the demo and the tests need from Debian's packages, and prepares the guest they boot.
#
# Works as root or through sudo, asks nothing, and touches only what is missing: on a machine that has everything it
# takes a moment and needs no network. A step that fails ends the run with one line that says which.
set -euo pipefail

# QEMU is taken from the distribution in two steps. qemu-system-x86 comes first: a machine may carry a newer qemu-utils
# from elsewhere, which conflicts with it and is removed here; qemu-utils then comes in the version that belongs to it.
# Asked for both at once, apt finds no solution.
emulator=(qemu-system-x86)
tools=(make systemd dpkg-dev binutils qemu-utils fio cpio kmod busybox-static e2fsprogs util-linux xz-utils zstd strace dmsetup pciutils cryptsetup-bin libvhdi-utils python3-libvhdi libvmdk-utils python3-libvmdk libnbd-bin python3-libnbd nbdkit nbd-server)

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Those of the named packages that are not installed.
missing() {
    local package
    for package in "$@"; do
        case "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" in
            *' installed') ;;
            *) echo "$package" ;;
        esac
    done
}

# apt-get as root. sudo may ask for a password only where somebody can answer.
apt() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        [ -t 0 ] || as_root+=(-n)
        "${as_root[@]}" true || fail "not root, and sudo does not help: cannot run apt-get $*"
    fi
    # The lists may fail to refresh in part and still do; if not, the log tells when a package is not found.
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >>"$log" 2>&1 ||
        {
            cat "$log" >&2
            fail "apt-get $* failed (its output is above)"
        }
}

install() {
    local wanted
    wanted=$(missing "$@")
    [ -n "$wanted" ] || return 0
    echo "setup: installing" $wanted
    # shellcheck disable=SC2086 # one word per package
    apt install -y --no-install-recommends $wanted
}

command -v apt-get >/dev/null || fail "no apt-get here: Debian 12 is needed (or install ${emulator[*]} ${tools[*]} yourself)"
command -v cargo >/dev/null || fail "no cargo in PATH: install Rust first (https://rustup.rs)"

for component in rustfmt clippy; do
    "cargo-${component/rustfmt/fmt}" --version >/dev/null 2>&1 && continue
    echo "setup: installing $component"
    rustup component add "$component" || fail "cargo has no $component, and rustup did not add it"
done

log=$(mktemp)
trap 'rm -f "$log"' EXIT

guest=$(dirname "$0")/guest/build.sh
if [ -n "$(missing "${emulator[@]}" "${tools[@]}")" ] || ! "$guest" --is-built; then
    echo "setup: refreshing the package lists"
    apt update
fi
install "${emulator[@]}"
install "${tools[@]}"
"$guest"
