//! The types of objects that `--object` makes.

/// What qemu-storage-daemon 7.2 knows, and qemu-img but for `iothread`: so that a type that we lack is distinguished
/// from one that nobody has.
pub const OBJECT_TYPES: [&str; 14] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "iothread",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];
