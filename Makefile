# The project's commands. Each prepares what it needs from Debian's packages (tests/setup.sh: as root or through sudo).
# BENCH='…' hands options to the benchmark; FUZZ_SECONDS is how long each fuzz target runs, SOAK_SECONDS the soak.

CARGO ?= cargo

.PHONY: help setup demo test test-nvme test-without-io-uring bench bench-nvme fuzz fuzz-seeds install install-files install-user package

help:
	@echo 'make demo   serve a fresh disk to a small real Linux guest and check its work'
	@echo 'make test   all tests, as CI runs them'
	@echo 'make test-nvme  the tests of NVMe controllers alone, in memory and in guests with an IOMMU'
	@echo 'make test-without-io-uring  the tests of disks where threads do the I/O'
	@echo 'make bench  measure vublk beside qemu-storage-daemon'
	@echo 'make bench-nvme  measure the NVMe driver in a guest, beside qemu-storage-daemon and the kernel'
	@echo 'make fuzz   run the fuzz targets, FUZZ_SECONDS=60 each'
	@echo 'make soak   a guest under load through kills, upgrades, resizes, hot-plug and migration, and a warm chain of images, SOAK_SECONDS=3600'
	@echo 'make install PREFIX=/usr/local  the program, its man pages, completions and systemd unit'
	@echo 'make package  a Debian package, target/debian/vublk_*.deb'

setup:
	@tests/setup.sh

demo: setup
	$(CARGO) build --release --locked
	@tests/guest/demo.sh

test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --workspace --locked
	@$(MAKE) --no-print-directory test-without-io-uring THREADS_TESTS='vhost_user:: file:: monitor::resize'

test-nvme: setup
	$(CARGO) test --locked -p vublk-vfio
	$(CARGO) test --locked -p vublk --test it nvme
	$(CARGO) test --locked -p vublk --test it -- --ignored nvme::served nvme::page

# What a command line prints is compared word by word, and has the warning then.
THREADS_TESTS ?= --skip cli:: --skip monitor::ctl

# The same tests of disks where the kernel refuses io_uring, and threads do the I/O.
test-without-io-uring: setup
	$(CARGO) run --quiet --locked -p vublk-testkit --bin without-io-uring $(CARGO) test --locked -p vublk --test it -- $(THREADS_TESTS)

bench: setup
	$(CARGO) build --release --locked
	$(CARGO) run --release --locked -p vublk-bench -- $(BENCH)

bench-nvme: setup
	$(CARGO) build --release --locked
	$(CARGO) run --release --locked -p vublk-bench -- nvme $(BENCH)

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= virtqueue vhost_user_messages options nvme qcow2_header qcow2_check qcow2_snapshots qcow2_bitmaps qcow parallels parallels_bundle bochs cloop dmg vhdx vmdk vpc

# Its last lines tell how often each target ran in a second. fuzz-seeds keeps in the tree what the runs have found.
fuzz: setup
	@tests/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

fuzz-seeds: setup
	@tests/fuzz/run.sh --seeds $(FUZZ_TARGETS)

SOAK_SECONDS ?= 3600

# The verdict is its last lines and its exit code; VUBLK_SEED repeats a run.
soak: setup
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --locked -p vublk --test soak -- --nocapture

PREFIX ?= /usr/local
DESTDIR ?=

# What `install` installs, and where its man pages and completions are made.
PROGRAM = target/release/vublk
GENERATED = target/generated

install:
	$(CARGO) build --release --locked -p vublk
	@$(MAKE) --no-print-directory install-files
	@test -n "$(DESTDIR)" || test "$$(id -u)" != 0 || $(MAKE) --no-print-directory install-user

# The user that the unit runs as, and its folder.
install-user:
	systemd-sysusers $(PREFIX)/lib/sysusers.d/vublk.conf
	systemd-tmpfiles --create $(PREFIX)/lib/tmpfiles.d/vublk.conf
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

# Of a program that is built.
install-files:
	$(PROGRAM) generate $(GENERATED)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(PROGRAM)
	install -d $(DESTDIR)$(PREFIX)/libexec
	ln -sf ../bin/vublk $(DESTDIR)$(PREFIX)/libexec/vhost-user-block
	install -d $(DESTDIR)$(PREFIX)/share/qemu/vhost-user
	sed 's|/usr/libexec|$(PREFIX)/libexec|' dist/50-vublk.json > $(DESTDIR)$(PREFIX)/share/qemu/vhost-user/50-vublk.json
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 $(GENERATED)/*.1
	install -D -m 644 $(GENERATED)/vublk.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/vublk
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(GENERATED)/_vublk
	install -D -m 644 $(GENERATED)/vublk.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/vublk.fish
	install -D -m 644 dist/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/vublk.conf
	install -D -m 644 dist/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/vublk.conf
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/bin/vublk|$(PREFIX)/bin/vublk|' dist/vublk@.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/vublk@.service

package:
	$(CARGO) build --release --locked -p vublk
	@dist/deb/build.sh $(PROGRAM) target/debian
