# The project's commands. Each prepares what it needs from Debian's packages (tests/setup.sh: as root or through sudo).
# BENCH='…' hands options to the benchmark.

CARGO ?= cargo

.PHONY: help setup demo test bench

help:
	@echo 'make demo   serve a fresh disk to a small real Linux guest and check its work'
	@echo 'make test   all tests, as CI runs them'
	@echo 'make bench  measure vublk beside qemu-storage-daemon'

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
