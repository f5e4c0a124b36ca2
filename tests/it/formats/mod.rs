//! Image formats beside qcow2 that are written: each suite here runs over all of them.

mod cancelled;
mod crash;
mod journal;
mod model;
mod qed;
