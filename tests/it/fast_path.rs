//! The fast path as an export takes it: a source that maps, starts on leaves and gets completions.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use vublk::block::{Access, Node, Target};
use vublk::io::epoch::{Announcer, Generation};
use vublk::io::{
    AlignedBuf, Io, IoResult, IoVec, Local, Polled, Segments, Source, SourceId, Started, Token,
    is_aligned,
};

/// Starts transfers on the fast path of one node. Clones are the same queue.
#[derive(Clone)]
pub struct FastPath(Rc<RefCell<Inbox>>);

#[derive(Default)]
struct Inbox {
    node: Option<Arc<Node>>,
    new: VecDeque<Request>,
    closed: bool,
    me: Option<SourceId>,
}

struct Request {
    access: Access,
    at: u64,
    buf: AlignedBuf,
    end: Rc<RefCell<End>>,
}

#[derive(Default)]
struct End {
    /// The buffer back, and the result; no result if the path was not open.
    done: Option<(AlignedBuf, Option<IoResult>)>,
    waker: Option<Waker>,
}

impl FastPath {
    /// A queue on this worker.
    pub fn attach(local: &mut Local) -> FastPath {
        let inbox = Rc::new(RefCell::new(Inbox::default()));
        let source = PathSource { inbox: inbox.clone(), announcer: None, slots: Vec::new() };
        let me = local.attach(Box::new(source), None);
        inbox.borrow_mut().me = Some(me);
        FastPath(inbox)
    }

    /// Sets the node whose fast path this is. Called once.
    pub fn serve(&self, node: &Arc<Node>) {
        self.0.borrow_mut().node = Some(node.clone());
    }

    /// Transfers the whole buffer, unless a layer takes the slow path.
    pub async fn transfer(
        &self,
        access: Access,
        at: u64,
        buf: AlignedBuf,
    ) -> (AlignedBuf, Option<IoResult>) {
        let end: Rc<RefCell<End>> = Rc::default();
        self.0.borrow_mut().new.push_back(Request { access, at, buf, end: end.clone() });
        let me = self.0.borrow().me.expect("it was attached");
        vublk::io::current().wake_source(me);
        std::future::poll_fn(|cx| {
            let mut end = end.borrow_mut();
            match end.done.take() {
                Some(done) => Poll::Ready(done),
                None => {
                    end.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Ends the source, once what it has begun is done.
    pub fn close(&self) {
        self.0.borrow_mut().closed = true;
    }
}

struct PathSource {
    inbox: Rc<RefCell<Inbox>>,
    announcer: Option<(Arc<Node>, Announcer)>,
    slots: Vec<Option<Slot>>,
}

struct Slot {
    request: Request,
    /// One per extent: the leaf reads its list until the end.
    lists: Vec<Box<[libc::iovec]>>,
    left: usize,
    result: IoResult,
    generation: Generation,
}

fn finish(request: Request, result: Option<IoResult>) {
    let mut end = request.end.borrow_mut();
    end.done = Some((request.buf, result));
    if let Some(waker) = end.waker.take() {
        waker.wake();
    }
}

impl PathSource {
    fn begin(&mut self, io: &Io, me: SourceId, mut request: Request) {
        let Some((node, announcer)) = &self.announcer else {
            return finish(request, None);
        };
        let turn = announcer.enter();
        let (start, len, access) = (request.at, request.buf.len() as u64, request.access);
        let (mut done, mut extents, mut lists) = (0, Vec::new(), Vec::new());
        while done < len {
            let mapping = node.map(turn.in_flight(), start + done, len - done, access);
            assert!((1..=len - done).contains(&mapping.len), "a mapping of {}", mapping.len);
            let part = &mut request.buf[done as usize..][..mapping.len as usize];
            let list: Box<[libc::iovec]> = IoVec::from_mut(part).as_raw().into();
            match mapping.target {
                Target::Data { leaf, offset } if is_aligned(&list, node.traits().buffer_align) => {
                    extents.push((leaf, offset, mapping.len));
                    lists.push(list);
                }
                Target::Zero if access == Access::Read => part.fill(0),
                _ => return finish(request, None),
            }
            done += mapping.len;
        }
        let generation = turn.begin();
        let tag = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let (mut left, mut result) = (lists.len(), Ok(()));
        for ((leaf, offset, len), list) in extents.into_iter().zip(&lists) {
            let op = access.op(offset, Segments::new(list, len));
            let token = Token { source: me, tag: tag as u32 };
            // SAFETY: the buffer and the lists stay in the slot until the completion.
            if let Started::Done(done) = unsafe { leaf.start(io, op, token) } {
                left -= 1;
                result = result.and(done);
            }
        }
        self.slots[tag] = Some(Slot { request, lists, left, result, generation });
        drop(turn);
        self.end_if_done(tag);
    }

    fn end_if_done(&mut self, tag: usize) {
        if self.slots[tag].as_ref().is_some_and(|slot| slot.left == 0)
            && let Some(slot) = self.slots[tag].take()
        {
            drop(slot.lists);
            let (_, announcer) = self.announcer.as_ref().expect("something was begun");
            announcer.end(slot.generation);
            announcer.settle();
            finish(slot.request, Some(slot.result));
        }
    }
}

impl Source for PathSource {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let (new, closed) = {
            let mut inbox = self.inbox.borrow_mut();
            if let Some(node) = inbox.node.take() {
                let announcer = node.announcer();
                self.announcer = Some((node, announcer));
            }
            (std::mem::take(&mut inbox.new), inbox.closed)
        };
        let busy = !new.is_empty();
        new.into_iter().for_each(|request| self.begin(io, me, request));
        match () {
            _ if busy => Polled::Busy,
            _ if closed && self.slots.iter().all(Option::is_none) => Polled::Ended,
            _ => Polled::Idle,
        }
    }

    fn has_work(&self) -> bool {
        !self.inbox.borrow().new.is_empty()
    }

    fn complete(&mut self, _: &Rc<Io>, tag: u32, result: IoResult) {
        let slot = self.slots[tag as usize].as_mut().expect("it was begun");
        slot.left -= 1;
        slot.result = slot.result.and(result);
        self.end_if_done(tag as usize);
    }

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        !self.has_work()
    }

    fn disarm(&mut self) {}
}
