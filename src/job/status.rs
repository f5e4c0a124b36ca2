//! The states of a job, the transitions between them, and the commands that each accepts.
//!
//! They are those of QEMU 7.2, as measured.

/// QEMU's JobStatus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Not told of yet.
    #[default]
    Undefined,
    Created,
    Running,
    /// Resting in its work.
    Paused,
    /// The work continues until somebody ends it.
    Ready,
    /// Resting while it is ready.
    Standby,
    /// The work has ended, and waits for that of others.
    Waiting,
    /// About to take effect.
    Pending,
    /// About to end without effect.
    Aborting,
    Concluded,
    /// Forgotten.
    Null,
}

/// What users ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Cancel,
    Pause,
    Complete,
    Finalize,
    Dismiss,
}

impl Verb {
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Status::Undefined => "undefined",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// Whether a job can go from here to `next`.
    pub fn may_become(self, next: Status) -> bool {
        use Status::*;
        match self {
            Undefined => next == Created,
            Created => matches!(next, Running | Paused | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => next == Running,
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => next == Ready,
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Concluded | Aborting),
            Aborting => next == Concluded,
            Concluded => next == Null,
            Null => false,
        }
    }

    /// Whether users may ask for it.
    pub fn allows(self, verb: Verb) -> bool {
        use Status::*;
        match verb {
            Verb::Cancel => {
                matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Verb::Pause => matches!(self, Created | Running | Paused | Ready | Standby),
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }
}
