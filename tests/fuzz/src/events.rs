//! The eventfds by which a guest and its queue notify each other.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::rc::Rc;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Those of one queue.
pub struct Events {
    pub kick: Arc<File>,
    pub call: Arc<File>,
    pub error: Arc<File>,
}

thread_local! {
    /// The thread's, which each run uses again.
    static EVENTS: Rc<Events> = Rc::new(Events { kick: eventfd(), call: eventfd(), error: eventfd() });
}

fn eventfd() -> Arc<File> {
    let eventfd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    // SAFETY: the descriptor is taken from its only owner.
    Arc::new(unsafe { File::from_raw_fd(eventfd.into_raw_fd()) })
}

impl Events {
    /// The thread's, without a word in them.
    pub fn silent() -> Rc<Events> {
        let events = EVENTS.with(Rc::clone);
        for file in [&events.kick, &events.call, &events.error] {
            take_word(file);
        }
        events
    }
}

/// Whether there is a word, which is gone then.
pub fn take_word(mut file: &File) -> bool {
    file.read(&mut [0; 8]).is_ok()
}
