//! Memory that outlives the process: a front end keeps it, and brings it to the daemon after this one.

use crate::block::Survivor;

/// What an export keeps there, besides the journal of its image ([`Survivor`]). Memory of another daemon may
/// have no room for any of it, and then forgets what is set.
pub trait Kept: Survivor {
    /// Whether the guest's write cache was on, if the memory knows.
    fn write_cache(&self) -> Option<bool>;

    fn set_write_cache(&self, on: bool);

    /// Whether an fsync has failed ([`super::loss`]).
    fn has_loss(&self) -> bool;

    fn set_loss(&self, is_lost: bool);

    /// Whether it has room for a journal.
    fn has_journal(&self) -> bool;
}
