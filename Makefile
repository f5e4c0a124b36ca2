# The project's commands. Each prepares what it needs from Debian's packages (tests/setup.sh: as root or through sudo).
# BENCH='…' hands options to the benchmark.

CARGO ?= cargo

.PHONY: help setup demo test bench install

help:
	@echo 'make demo   serve a fresh disk to a small real Linux guest and check its work'
	@echo 'make test   all tests, as CI runs them'
	@echo 'make bench  measure vublk beside qemu-storage-daemon'
	@echo 'make install PREFIX=/usr/local  the program, its man pages, completions and systemd unit'

setup:
	@tests/setup.sh

demo: setup
	$(CARGO) build --release --locked
	@tests/guest/demo.sh

test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --workspace --locked

bench: setup
	$(CARGO) build --release --locked
	$(CARGO) run --release --locked -p vublk-bench -- $(BENCH)

PREFIX ?= /usr/local
DESTDIR ?=

install:
	$(CARGO) build --release --locked -p vublk
	target/release/vublk generate target/generated
	install -D -t $(DESTDIR)$(PREFIX)/bin target/release/vublk
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 target/generated/*.1
	install -D -m 644 target/generated/vublk.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/vublk
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/zsh/site-functions target/generated/_vublk
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d target/generated/vublk.fish
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/bin/vublk|$(PREFIX)/bin/vublk|' dist/vublk@.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/vublk@.service
