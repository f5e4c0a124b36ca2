//! The rules of blkdebug: which request fails, and which stops.
//!
//! An event arms the error rules that are for it and for the present state; they stay armed until an
//! event arms others. A request fails by the first armed rule that fits its kind and its place. Rules
//! for the event `none` are armed from the beginning. Then the event changes the state, by the first
//! rule that says so.

use crate::block::event::OnStop;
use crate::block::{Debugger, Event, LocalFuture, SECTOR};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{Errno, IoResult};
use serde::Deserialize;
use std::ops::Range;
use std::task::Poll;

/// Kinds of I/O that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

/// `inject-error`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct InjectError {
    pub event: Event,
    /// In which it holds; 0 for any.
    #[serde(default)]
    pub state: i64,
    /// All but block status, if none is given.
    pub iotype: Option<IoType>,
    /// With one that is not positive, the request passes.
    #[serde(default = "eio")]
    pub errno: i32,
    /// Requests that touch it; -1, as none, for all.
    pub sector: Option<i64>,
    /// It goes when it has struck.
    #[serde(default)]
    pub once: bool,
    /// Without letting others run first.
    #[serde(default)]
    pub immediately: bool,
}

fn eio() -> i32 {
    libc::EIO
}

/// `set-state`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetState {
    pub event: Event,
    /// In which it holds; 0 for any.
    #[serde(default)]
    pub state: i64,
    pub new_state: i64,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strike {
    /// None: the rule was used up, and the request passes.
    pub errno: Option<Errno>,
    pub immediately: bool,
}

/// The engine. Shared by all workers.
pub struct Rules {
    transitions: Vec<SetState>,
    state: Mutex<State>,
}

struct State {
    /// QEMU's documentation: it begins with 1.
    number: i64,
    /// None where one has struck that holds once.
    errors: Vec<Option<InjectError>>,
    /// Indexes into `errors`.
    armed: Vec<usize>,
    breakpoints: Vec<Breakpoint>,
    next_id: u64,
    stopped: Vec<Stopped>,
}

struct Breakpoint {
    event: Event,
    tag: String,
    on_stop: OnStop,
}

struct Stopped {
    id: u64,
    tag: String,
    waiting: Waiters,
}

impl Rules {
    pub fn new(errors: Vec<InjectError>, transitions: Vec<SetState>) -> Rules {
        let rules = Rules {
            transitions,
            state: Mutex::new(State {
                number: 1,
                errors: errors.into_iter().map(Some).collect(),
                armed: Vec::new(),
                breakpoints: Vec::new(),
                next_id: 0,
                stopped: Vec::new(),
            }),
        };
        rules.arm(Event::None);
        rules
    }

    /// What an event does to the rules.
    fn arm(&self, event: Event) {
        let state = &mut *self.state.lock();
        let holds = |at: Event, in_state: i64| at == event && [0, state.number].contains(&in_state);
        let armed = state.errors.iter().enumerate().filter_map(|(n, rule)| {
            let rule = rule.as_ref()?;
            holds(rule.event, rule.state).then_some(n)
        });
        let armed: Vec<_> = armed.collect();
        let transition = self.transitions.iter().find(|rule| holds(rule.event, rule.state));
        if let Some(transition) = transition {
            state.number = transition.new_state;
        }
        if !armed.is_empty() {
            state.armed = armed;
        }
    }

    /// Fails if a rule says so.
    pub async fn check(&self, kind: IoType, range: Option<Range<u64>>) -> IoResult {
        let Some(strike) = self.strike(kind, range) else { return Ok(()) };
        let Some(errno) = strike.errno else { return Ok(()) };
        if !strike.immediately {
            let mut suspended = false;
            std::future::poll_fn(|cx| {
                if std::mem::replace(&mut suspended, true) {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
        Err(errno)
    }

    /// Whether a request of this kind fails. `range` is in bytes; a flush has none.
    fn strike(&self, kind: IoType, range: Option<Range<u64>>) -> Option<Strike> {
        let state = &mut *self.state.lock();
        let at = state.armed.iter().position(|&n| {
            state.errors[n].as_ref().is_some_and(|rule| rule.fits(kind, range.as_ref()))
        })?;
        let slot = &mut state.errors[state.armed[at]];
        let rule = slot.as_ref()?;
        let strike = Strike {
            errno: (rule.errno > 0).then_some(Errno(rule.errno)),
            immediately: rule.immediately,
        };
        if rule.once {
            *slot = None;
            state.armed.remove(at);
        }
        Some(strike)
    }
}

impl InjectError {
    fn fits(&self, kind: IoType, range: Option<&Range<u64>>) -> bool {
        let right_kind = match self.iotype {
            Some(wanted) => wanted == kind,
            None => kind != IoType::BlockStatus,
        };
        let right_place = match (self.sector, range) {
            (None | Some(-1), _) => true,
            (Some(_), None) => false,
            (Some(sector), Some(range)) => u64::try_from(sector).is_ok_and(|sector| {
                let start = sector.saturating_mul(SECTOR);
                range.start < start.saturating_add(SECTOR) && start < range.end
            }),
        };
        right_kind && right_place
    }
}

impl Debugger for Rules {
    fn raised(&self, event: Event) -> LocalFuture<'_, ()> {
        self.arm(event);
        Box::pin(self.stop_at(event))
    }

    fn flushing(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.check(IoType::Flush, None))
    }

    fn break_at(&self, event: Event, tag: &str, on_stop: OnStop) {
        let tag = tag.to_owned();
        self.state.lock().breakpoints.push(Breakpoint { event, tag, on_stop });
    }

    fn remove_breaks(&self, tag: &str) -> bool {
        let removed = {
            let state = &mut *self.state.lock();
            let before = state.breakpoints.len();
            state.breakpoints.retain(|point| point.tag != tag);
            state.breakpoints.len() != before
        };
        while self.resume(tag) {}
        removed
    }

    fn resume(&self, tag: &str) -> bool {
        let gone = {
            let state = &mut *self.state.lock();
            let at = state.stopped.iter().position(|stopped| stopped.tag == tag);
            at.map(|at| state.stopped.remove(at))
        };
        let found = gone.is_some();
        if let Some(stopped) = gone {
            stopped.waiting.wake();
        }
        found
    }

    fn has_stopped(&self, tag: &str) -> bool {
        self.state.lock().stopped.iter().any(|stopped| stopped.tag == tag)
    }
}

impl Rules {
    /// Holds a request up at the first breakpoint for its event, which is used up by that.
    async fn stop_at(&self, event: Event) {
        let (point, stop) = {
            let state = &mut *self.state.lock();
            let at = state.breakpoints.iter().position(|point| point.event == event);
            let Some(at) = at else { return };
            let point = state.breakpoints.remove(at);
            state.next_id += 1;
            let id = state.next_id;
            state.stopped.push(Stopped { id, tag: point.tag.clone(), waiting: Waiters::new() });
            (point, Stop { rules: self, id })
        };
        (point.on_stop)(&point.tag);
        self.state
            .wait_for(|state| {
                let mine = state.stopped.iter_mut().find(|stopped| stopped.id == stop.id);
                mine.map_or(Ok(()), |stopped| Err(&mut stopped.waiting))
            })
            .await;
    }
}

/// A request that has stopped; when it is dropped there, nobody has to resume it any more.
struct Stop<'a> {
    rules: &'a Rules,
    id: u64,
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.rules.state.lock().stopped.retain(|stopped| stopped.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Waker};

    fn error(event: Event) -> InjectError {
        InjectError {
            event,
            state: 0,
            iotype: None,
            errno: libc::EIO,
            sector: None,
            once: false,
            immediately: false,
        }
    }

    fn raise(rules: &Rules, event: Event) -> Poll<()> {
        rules.raised(event).as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    fn errno(rules: &Rules, kind: IoType, range: Range<u64>) -> Option<i32> {
        rules.strike(kind, Some(range)).and_then(|strike| strike.errno).map(|errno| errno.0)
    }

    const EIO: Option<i32> = Some(libc::EIO);

    #[test]
    fn an_event_arms_its_rules_until_others_are_armed() {
        let write = InjectError { iotype: Some(IoType::Write), ..error(Event::ReadAio) };
        let discard = InjectError { iotype: Some(IoType::Discard), ..error(Event::WriteAio) };
        let rules = Rules::new(vec![write, discard], vec![]);
        assert_eq!(errno(&rules, IoType::Write, 0..512), None);
        let _ = raise(&rules, Event::ReadAio);
        assert_eq!(errno(&rules, IoType::Write, 0..512), EIO);
        let _ = raise(&rules, Event::Pwritev);
        assert_eq!(errno(&rules, IoType::Write, 0..512), EIO);
        let _ = raise(&rules, Event::WriteAio);
        assert_eq!(errno(&rules, IoType::Write, 0..512), None);
        assert_eq!(errno(&rules, IoType::Discard, 0..512), EIO);
    }

    #[test]
    fn the_first_rule_strikes_and_one_that_holds_once_is_gone() {
        let once = InjectError { errno: libc::ENOSPC, once: true, ..error(Event::None) };
        let rules = Rules::new(vec![once.clone(), once, error(Event::None)], vec![]);
        let struck: Vec<_> = (0..4).map(|_| errno(&rules, IoType::Read, 0..1)).collect();
        assert_eq!(struck, [Some(libc::ENOSPC), Some(libc::ENOSPC), EIO, EIO]);
        let nothing = InjectError { errno: 0, once: true, ..error(Event::None) };
        let rules = Rules::new(vec![nothing, error(Event::None)], vec![]);
        assert_eq!(errno(&rules, IoType::Read, 0..1), None);
        assert_eq!(errno(&rules, IoType::Read, 0..1), EIO);
    }

    #[test]
    fn a_sector_is_hit_by_what_touches_it_and_a_flush_touches_none() {
        let third = InjectError { sector: Some(3), ..error(Event::None) };
        let rules = Rules::new(vec![third], vec![]);
        for (range, hit) in
            [(0..1536, false), (0..1537, true), (2047..2048, true), (2048..4096, false)]
        {
            assert_eq!(errno(&rules, IoType::Write, range.clone()).is_some(), hit, "{range:?}");
        }
        assert_eq!(rules.strike(IoType::Flush, None), None);
        let any = InjectError { sector: Some(-1), ..error(Event::None) };
        let rules = Rules::new(vec![any], vec![]);
        assert!(rules.strike(IoType::Flush, None).is_some());
        assert_eq!(rules.strike(IoType::BlockStatus, Some(0..1)), None, "only if it is named");
    }

    #[test]
    fn all_rules_of_an_event_see_the_state_before_it_and_the_first_transition_is_made() {
        let to = |state, new_state| SetState { event: Event::ReadAio, state, new_state };
        let second = InjectError { state: 2, ..error(Event::ReadAio) };
        let rules = Rules::new(vec![second], vec![to(1, 2), to(1, 3), to(2, 3)]);
        let read = || {
            let _ = raise(&rules, Event::ReadAio);
            errno(&rules, IoType::Read, 0..1)
        };
        assert_eq!([read(), read()], [None, EIO]);
        let third = InjectError { state: 3, ..error(Event::WriteAio) };
        let rules = Rules::new(vec![third], vec![to(0, 3)]);
        let _ = raise(&rules, Event::WriteAio);
        assert_eq!(errno(&rules, IoType::Write, 0..1), None);
        let _ = raise(&rules, Event::ReadAio);
        let _ = raise(&rules, Event::WriteAio);
        assert_eq!(errno(&rules, IoType::Write, 0..1), EIO);
    }

    #[test]
    fn a_request_stops_at_a_breakpoint_once_until_it_is_resumed() {
        let rules = Rules::new(vec![], vec![]);
        let stops = Arc::new(AtomicU32::new(0));
        let count = |stops: &Arc<AtomicU32>| -> OnStop {
            let stops = stops.clone();
            Box::new(move |tag| {
                assert_eq!(tag, "a");
                stops.fetch_add(1, Ordering::SeqCst);
            })
        };
        rules.break_at(Event::L2Load, "a", count(&stops));
        assert!(raise(&rules, Event::ReadAio).is_ready());
        let mut cx = Context::from_waker(Waker::noop());
        let mut first = rules.raised(Event::L2Load);
        assert!(first.as_mut().poll(&mut cx).is_pending());
        assert!(rules.has_stopped("a") && !rules.has_stopped("b"));
        assert!(raise(&rules, Event::L2Load).is_ready(), "the breakpoint is used up");
        assert!(!rules.resume("b"));
        assert!(rules.resume("a") && !rules.resume("a"));
        assert!(first.as_mut().poll(&mut cx).is_ready());

        rules.break_at(Event::L2Load, "a", count(&stops));
        let mut second = rules.raised(Event::L2Load);
        assert!(second.as_mut().poll(&mut cx).is_pending());
        rules.break_at(Event::L2Load, "a", count(&stops));
        assert!(rules.remove_breaks("a") && !rules.remove_breaks("a"));
        assert!(second.as_mut().poll(&mut cx).is_ready());
        assert!(raise(&rules, Event::L2Load).is_ready());
        assert_eq!(stops.load(Ordering::SeqCst), 2);

        rules.break_at(Event::L2Load, "a", count(&stops));
        let mut dropped = rules.raised(Event::L2Load);
        assert!(dropped.as_mut().poll(&mut cx).is_pending());
        drop(dropped);
        assert!(!rules.has_stopped("a"));
    }
}
