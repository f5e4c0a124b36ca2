//! A vhost-user-blk front end and process control, for tests and benchmarks.
