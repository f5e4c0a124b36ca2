//! One client after its handshake: a task that reads requests, one for each request, and one that sends replies.
//!
//! What a client can make us keep is bounded: its requests in flight by number, their data by bytes. A client that
//! does not take its replies is not read from any more, and holds up nobody else.

use super::export::Shared;
use super::offer::Client;
use super::replies::{self, Reply};
use super::server::Ticket;
use super::work::{Refusal, Rules};
use crate::export::core::metrics::Recorder;
use crate::io::budget::{Limits, Pool};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Budget, Deadline, Errno, Permit, Socket, current};
use crate::nbd::request::*;
use crate::nbd::{Headers, MAX_DATA, Malformed};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// Requests of one client in flight, or with replies that are not sent.
const MOST_REQUESTS: usize = 256;
/// What their data take: one request of the longest kind, and of shorter ones as many; a little in any case,
/// whatever others have.
const DATA: Limits = Limits { most: MAX_DATA as u64, reserved: 1 << 20 };
/// Bytes that are received at a time at most, beside the data of long writes.
const INPUT: usize = 64 << 10;
/// Payload of a request for block status at most, in bytes.
const MOST_QUERY: u64 = 4096;

/// A client that is served.
struct Connection {
    shared: Arc<Shared>,
    /// The number of its worker among the export's.
    lane: usize,
    socket: Arc<Socket>,
    headers: Headers,
    contexts: Vec<u32>,
    data: Arc<Budget>,
    recorder: RefCell<Option<Recorder>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Replies to be sent.
    out: VecDeque<Reply>,
    /// Requests without a reply that was sent.
    open: usize,
    /// No other request comes.
    ended: bool,
    /// Nothing can be sent any more.
    broken: bool,
    sender_left: bool,
    sender: Waiters,
    reader: Waiters,
}

/// Why no other request is read.
enum End {
    /// The client has said so, or has gone.
    Gone,
    /// What it has said makes no sense; a line for the log.
    Refused(String),
}

impl From<Malformed> for End {
    fn from(error: Malformed) -> End {
        End::Refused(error.to_string())
    }
}

/// Serves a client until it leaves.
pub(super) async fn serve(shared: Arc<Shared>, lane: usize, client: Client) {
    let Client { socket, headers, contexts, ticket } = client;
    let recorder = shared.disk.metrics.as_ref().and_then(|metrics| metrics.recorder(lane));
    let connection = Rc::new(Connection {
        data: Budget::new(DATA, Pool::of_process()),
        recorder: RefCell::new(recorder),
        state: Mutex::default(),
        shared,
        lane,
        socket,
        headers,
        contexts,
    });
    current().spawn(connection.clone().send_replies());
    let result = connection.read_requests().await;
    connection.leave(result, ticket).await;
}

impl Connection {
    async fn read_requests(self: &Rc<Connection>) -> Result<(), End> {
        let mut input = Input::new(&self.socket)?;
        loop {
            let header = input.take(self.headers.request_len()).await?;
            let request = Request::decode(self.headers, header)?;
            if request.command == CMD_DISC {
                return Ok(());
            }
            let payload = request.payload_len(self.headers);
            if payload > MAX_DATA.into() {
                let name = command_name(request.command);
                return Err(End::Refused(format!("a {name} request has {payload} bytes of data")));
            }
            self.room().await?;
            let query = match request.command {
                CMD_BLOCK_STATUS if (8..=MOST_QUERY).contains(&payload) => {
                    Some(StatusQuery::decode(input.take(payload as usize).await?)?)
                }
                _ => None,
            };
            let mut left = if query.is_some() { 0 } else { payload };
            let rules =
                Rules { disk: &self.shared.disk, headers: self.headers, contexts: &self.contexts };
            let planned = match request.command {
                CMD_WRITE => rules.plan(&request, None),
                _ if left > 0 => Err(Refusal {
                    errno: Errno::EINVAL,
                    text: "the request has data that it must not have".into(),
                }),
                _ => rules.plan(&request, query),
            };
            let planned = match planned {
                Ok(work) => match self.memory(&request).await {
                    Ok(mut data) => {
                        if let (CMD_WRITE, Some((buffer, _))) = (request.command, &mut data) {
                            input.fill(buffer).await?;
                            left = 0;
                        }
                        Ok((work, data))
                    }
                    Err(errno) => Err(Refusal { errno, text: "no memory".into() }),
                },
                Err(refusal) => Err(refusal),
            };
            input.skip(left).await?;
            match planned {
                Ok((work, data)) => {
                    self.state.lock().open += 1;
                    self.begin(request, work, data);
                }
                Err(Refusal { errno, text }) => {
                    self.state.lock().open += 1;
                    self.push(Reply::failed(self.headers, &request, errno, &text));
                }
            }
        }
    }

    /// Waits until one more request may be open.
    ///
    /// # Errors
    /// Nobody takes its reply any more.
    async fn room(&self) -> Result<(), End> {
        self.state
            .wait_for(|state| match (state.broken, state.open < MOST_REQUESTS) {
                (true, _) => Ok(Err(End::Gone)),
                (false, true) => Ok(Ok(())),
                (false, false) => Err(&mut state.reader),
            })
            .await
    }

    /// Memory for the data of a read or write, once there is some.
    async fn memory(&self, request: &Request) -> Result<Option<(AlignedBuf, Permit)>, Errno> {
        if !matches!(request.command, CMD_READ | CMD_WRITE) || request.length == 0 {
            return Ok(None);
        }
        let permit = self.data.take(request.length).await;
        let align = self.shared.buffer_align();
        let buffer = AlignedBuf::for_overwriting(request.length as usize, align);
        Ok(Some((buffer.ok_or(Errno::ENOMEM)?, permit)))
    }

    /// Starts a request as a task.
    fn begin(
        self: &Rc<Connection>,
        request: Request,
        work: super::work::Work,
        data: Option<(AlignedBuf, Permit)>,
    ) {
        let io = current();
        let taken_at = self.recorder.borrow_mut().as_mut().map(|recorder| {
            recorder.begin(&io);
            recorder.taken_at(None)
        });
        let connection = self.clone();
        io.spawn(async move {
            let Connection { shared, lane, headers, recorder, .. } = &*connection;
            let operation = work.operation();
            let needs = work.memory(&shared.disk, &request, data.as_ref().map(|(data, _)| data));
            let memory = shared.disk.memory.take(needs).await;
            let entered = shared.lanes.enter(*lane).await;
            let run = work.run(&shared.disk, &shared.contexts, *headers, &request, data);
            let (reply, works) = run.await;
            drop((memory, entered));
            if let (Some(recorder), Some(taken_at)) = (&mut *recorder.borrow_mut(), taken_at) {
                recorder.end(&current());
                let bytes = request.length.min(u32::MAX.into()) as u32;
                recorder.ended(operation, works, taken_at, bytes);
                recorder.show(shared.lanes.count_on(*lane), 0, 0);
            }
            shared.count(operation);
            connection.push(reply);
        });
    }

    /// Has the reply to an open request sent.
    fn push(&self, reply: Reply) {
        let sender = {
            let mut state = self.state.lock();
            match state.broken {
                true => state.open -= 1,
                false => state.out.push_back(reply),
            }
            state.sender.take()
        };
        sender.wake();
    }

    /// Sends replies as they come, until the last.
    async fn send_replies(self: Rc<Connection>) {
        let mut batch: Vec<Reply> = Vec::new();
        loop {
            let next = |state: &mut State, batch: &mut Vec<Reply>| {
                let count = match state.out.is_empty() {
                    false => replies::batch(state.out.iter()),
                    true if state.ended && state.open == 0 => 0,
                    true => return Err(()),
                };
                batch.extend(state.out.drain(..count));
                Ok(())
            };
            let all = &self.state;
            all.wait_for(|state| next(state, &mut batch).map_err(|()| &mut state.sender)).await;
            if batch.is_empty() {
                break;
            }
            let sent = replies::send(&self.socket, &batch).await;
            let count = batch.len();
            batch.clear();
            let reader = {
                let mut state = self.state.lock();
                state.open -= count;
                if sent.is_err() {
                    state.broken = true;
                    state.open -= state.out.len();
                    state.out.clear();
                }
                state.reader.take()
            };
            if sent.is_err() {
                // Whoever reads hears of it.
                self.socket.shut_down();
            }
            reader.wake();
        }
        let reader = {
            let mut state = self.state.lock();
            state.sender_left = true;
            state.reader.take()
        };
        reader.wake();
    }

    /// Waits until nothing of the client is in flight any more.
    async fn leave(&self, result: Result<(), End>, ticket: Ticket) {
        if let Err(End::Refused(why)) = &result {
            log::warn!(export = &*self.shared.disk.name; "NBD client refused: {why}");
            self.socket.shut_down();
        }
        let sender = {
            let mut state = self.state.lock();
            state.ended = true;
            state.sender.take()
        };
        sender.wake();
        let left = |state: &mut State| if state.sender_left { Ok(()) } else { Err(()) };
        self.state.wait_for(|state| left(state).map_err(|()| &mut state.reader)).await;
        self.socket.shut_down();
        drop(ticket);
    }
}

/// What a client has sent and nobody has looked at yet.
struct Input<'a> {
    socket: &'a Socket,
    buffer: AlignedBuf,
    start: usize,
    end: usize,
}

impl<'a> Input<'a> {
    fn new(socket: &'a Socket) -> Result<Input<'a>, End> {
        let buffer = AlignedBuf::for_overwriting(INPUT, 1);
        let buffer = buffer.ok_or_else(|| End::Refused("no memory for its requests".into()))?;
        Ok(Input { socket, buffer, start: 0, end: 0 })
    }

    /// Receives something.
    async fn receive(&mut self) -> Result<(), End> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < MOST_QUERY as usize {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = (self.buffer.len() - self.end) as u64;
        let list = self.buffer.io_vec().slice(self.end as u64, room);
        match self.socket.receive(&list, Deadline::NEVER).await {
            Ok(0) | Err(_) => Err(End::Gone),
            Ok(n) => {
                self.end += n as usize;
                Ok(())
            }
        }
    }

    /// The next `len` bytes, at most [`MOST_QUERY`].
    async fn take(&mut self, len: usize) -> Result<&[u8], End> {
        while self.end - self.start < len {
            self.receive().await?;
        }
        self.start += len;
        Ok(&self.buffer[self.start - len..self.start])
    }

    /// Fills `into` with the next bytes.
    async fn fill(&mut self, into: &mut AlignedBuf) -> Result<(), End> {
        let n = into.len().min(self.end - self.start);
        into.io_vec().copy_from(&self.buffer[self.start..self.start + n]);
        self.start += n;
        let list = into.io_vec();
        let mut done = n as u64;
        while done < list.len() {
            let rest = list.slice(done, list.len() - done);
            match self.socket.receive(&rest, Deadline::NEVER).await {
                Ok(0) | Err(_) => return Err(End::Gone),
                Ok(n) => done += u64::from(n),
            }
        }
        Ok(())
    }

    /// Passes over bytes that nobody wants.
    async fn skip(&mut self, len: u64) -> Result<(), End> {
        let mut left = len;
        while left > 0 {
            if self.start == self.end {
                self.receive().await?;
            }
            let n = left.min((self.end - self.start) as u64);
            self.start += n as usize;
            left -= n;
        }
        Ok(())
    }
}
