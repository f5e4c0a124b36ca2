//! The workers whose requests may be on the fast path through a node.
//!
//! A change of something that such requests rely on waits for them ([`crate::io::epoch`]).

use super::Node;
use crate::io::epoch::Member;
use std::sync::Arc;

impl Node {
    /// Announces `member` as one whose fast requests may go through this node, and everything below.
    pub fn add_member(&self, member: &Arc<Member>) {
        self.add_own_member(member);
        self.below().iter().for_each(|node| node.add_own_member(member));
    }

    fn add_own_member(&self, member: &Arc<Member>) {
        let mut members = self.members.lock();
        members.retain(|m| Arc::strong_count(m) > 1);
        if !members.iter().any(|m| Arc::ptr_eq(m, member)) {
            members.push(member.clone());
        }
    }

    /// The members whose fast requests may go through this node.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.members.lock().clone()
    }
}
