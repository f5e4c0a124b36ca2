//! vublk: a userspace storage backend for virtual machines.
