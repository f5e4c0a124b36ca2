#!/usr/bin/env bash
# Builds the Debian package of a program that is built, with dpkg-deb: dist/deb/build.sh PROGRAM FOLDER
#
# What is in it is what `make install` installs, and examples: there is one list of files. (cargo-deb would want a
# second one, and is some minutes of compiling on a fresh machine.) Prints the package's name.
set -euo pipefail
program=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
doc=$root/usr/share/doc/vublk

make --no-print-directory install-files PROGRAM="$program" PREFIX=/usr DESTDIR="$root" GENERATED="$work/generated" >&2
strip "$root/usr/bin/vublk"
gzip -9n "$root"/usr/share/man/man1/*.1
# Where Debian's zsh looks.
mkdir -p "$root/usr/share/zsh/vendor-completions"
mv "$root"/usr/share/zsh/site-functions/_vublk "$root/usr/share/zsh/vendor-completions/"
rmdir "$root/usr/share/zsh/site-functions"
install -d "$root/etc/vublk"
install -D -m 644 -t "$doc/examples" dist/examples/*
install -D -m 644 README.md "$doc/README.md"
install -D -m 644 -t "$doc/docs" docs/*.md
install -D -m 644 CHANGELOG.md "$doc/changelog"
gzip -9n "$doc/changelog"
{
    echo "vublk is under the Apache License, Version 2.0, or the MIT licence, as you like."
    echo "Debian has the former in /usr/share/common-licenses/Apache-2.0. The latter:"
    echo
    cat LICENSE-MIT
} >"$doc/copyright"
chmod 644 "$doc/copyright"

version=$("$program" --version | cut -d' ' -f2)
# The libraries it needs, in the versions whose symbols it uses.
mkdir -p "$work/shlibs/debian"
printf 'Source: vublk\n\nPackage: vublk\nArchitecture: any\n' >"$work/shlibs/debian/control"
libraries=$(cd "$work/shlibs" && dpkg-shlibdeps -O "$root/usr/bin/vublk" 2>/dev/null | sed -n 's/^shlibs:Depends=//p')

mkdir "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<EOF
Package: vublk
Version: $version
Architecture: $(dpkg --print-architecture)
Maintainer: The vublk developers <vublk@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f1)
Depends: $libraries, systemd (>= 245)
Suggests: qemu-system-x86, prometheus
Section: admin
Priority: optional
Description: serves disks to virtual machines over vhost-user-blk
 One process takes the guests' virtqueues from shared memory and carries each
 request through a graph of block nodes down to a file or block device, with
 io_uring. It stands where qemu-storage-daemon stands, and takes its command
 line.
EOF
install -m 755 -t "$root/DEBIAN" dist/deb/postinst dist/deb/postrm
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
chmod -R u=rwX,go=rX "$root"
dpkg-deb --root-owner-group --build "$root" "$out" >&2
echo "$out/vublk_${version}_$(dpkg --print-architecture).deb"
