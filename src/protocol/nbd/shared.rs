//! What all workers have of an export: its connections, and what flushes owe.

use super::connect::{Connection, Target};
use super::flushes::Flushes;
use super::handshake::Agreed;
use super::link::Link;
use super::requests::{Ask, RemoteDone};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{Errno, IoResult, PerWorker};
use crate::nbd::ExportFlags;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How long a closing node waits for its workers.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Shared {
    pub target: Target,
    /// What the first connection has agreed on, and the node has promised.
    pub agreed: Agreed,
    pub links: PerWorker<Link>,
    pub flushes: Flushes,
    pool: Mutex<Pool>,
}

struct Pool {
    /// Connections without a worker.
    spare: Vec<Connection>,
    /// Connections that there are, or are being made.
    live: u32,
    /// As many there may be.
    most: u32,
    /// Workers that have one, for those that get none.
    hosts: Vec<Host>,
    next_host: usize,
    /// Those who wait for any of this to change.
    waiting: Waiters,
}

/// A request of another worker's, and whom to tell: also when nobody takes it.
pub struct Remote {
    ask: Ask,
    done: Option<RemoteDone>,
}

impl Remote {
    pub fn new(ask: Ask, done: RemoteDone) -> Remote {
        Remote { ask, done: Some(done) }
    }

    pub fn into_parts(mut self) -> (Ask, Option<RemoteDone>) {
        (self.ask, self.done.take())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(None);
        }
    }
}

/// Where other workers send requests to.
#[derive(Clone)]
pub struct Host {
    /// The link's.
    pub number: u64,
    pub requests: Sender<Remote>,
    pub mail: Arc<Mail>,
}

/// Says that there are requests.
pub struct Mail {
    pub is_there: AtomicBool,
    pub event: EventFd,
}

impl Host {
    /// False if the link has ended.
    pub fn send(&self, remote: Remote) -> bool {
        let is_sent = self.requests.send(remote).is_ok();
        self.mail.is_there.store(true, Ordering::SeqCst);
        // Full means that it is readable already.
        let _ = self.mail.event.write(1);
        is_sent
    }
}

/// A worker's right to a connection.
pub enum Claim {
    There(Connection),
    ToMake,
}

impl Shared {
    pub fn new(target: Target, first: Connection) -> Shared {
        let agreed = first.agreed;
        let is_safe = agreed.flags.contains(ExportFlags::CAN_MULTI_CONN);
        let most = if is_safe { target.most_connections() } else { 1 };
        let pool = Pool {
            spare: vec![first],
            live: 1,
            most,
            hosts: Vec::new(),
            next_host: 0,
            waiting: Waiters::new(),
        };
        Shared {
            target,
            agreed,
            links: PerWorker::default(),
            flushes: Flushes::default(),
            pool: Mutex::new(pool),
        }
    }

    /// A connection for this worker, unless there are as many as there may be.
    pub fn claim(&self) -> Option<Claim> {
        let mut pool = self.pool.lock();
        if let Some(spare) = pool.spare.pop() {
            return Some(Claim::There(spare));
        }
        let may = pool.live < pool.most;
        pool.live += u32::from(may);
        may.then_some(Claim::ToMake)
    }

    /// One could not be made. True if there are others, and no more will be tried for; otherwise the claim stays.
    pub fn has_enough(&self) -> bool {
        let mut pool = self.pool.lock();
        if pool.live < 2 {
            return false;
        }
        pool.live -= 1;
        pool.most = pool.live;
        true
    }

    pub fn add_host(&self, host: Host) {
        self.change(|pool| pool.hosts.push(host));
    }

    pub fn remove_host(&self, number: u64) {
        self.change(|pool| pool.hosts.retain(|host| host.number != number));
    }

    /// A worker does without its connection, if it had one.
    pub async fn give_back(&self, connection: Option<Connection>) {
        match connection {
            Some(connection) if !self.links.is_closed() => {
                self.change(|pool| pool.spare.push(connection));
            }
            other => {
                self.change(|pool| pool.live -= 1);
                if let Some(connection) = other {
                    connection.end().await;
                }
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Pool)) {
        let mut pool = self.pool.lock();
        change(&mut pool);
        let waiting = pool.waiting.take();
        drop(pool);
        waiting.wake();
    }

    /// One of the workers that have a connection, in turns; none if this one can have one itself.
    pub async fn host(&self) -> Option<Host> {
        let look = |pool: &mut Pool| {
            if !pool.spare.is_empty() || pool.live < pool.most || self.links.is_closed() {
                return Ok(None);
            }
            pool.next_host = pool.next_host.wrapping_add(1);
            let at = pool.next_host % pool.hosts.len().max(1);
            pool.hosts.get(at).cloned().map(Some).ok_or(())
        };
        self.pool.wait_for(|pool| look(pool).map_err(|()| &mut pool.waiting)).await
    }

    /// Ends all connections.
    pub async fn close(&self) -> IoResult {
        self.links.close();
        if !self.links.left_within(PATIENCE).await {
            log::error!("{}: its connections are still in use", self.target.name());
            return Err(Errno(libc::ETIMEDOUT));
        }
        let spare = std::mem::take(&mut self.pool.lock().spare);
        for connection in spare {
            connection.end().await;
        }
        Ok(())
    }
}
