//! The guest's handling of results: it waits, reaps, and compares them with its requests.

use super::*;

impl Guest {
    /// Makes available what was laid out.
    pub(super) fn notify(&self) {
        self.memory.put(self.available + 2, &self.index.to_le_bytes());
        if self.words.kicked {
            let _ = (&*self.words.events.kick).write(&1u64.to_ne_bytes());
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        take_word(&self.words.events.error)
    }

    /// Checks that the queue of an honest guest has not failed.
    pub(super) fn must_be_whole(&self) {
        assert!(!self.is_broken(), "a guest that keeps to the rules has broken its queue");
    }

    pub(super) async fn wait(&mut self) {
        self.notify();
        sleep(Duration::from_micros(200)).await;
        self.reap();
    }

    /// Waits until everything that was made available has come back; of the honest, that is a law.
    pub(super) async fn settle(&mut self) {
        self.notify();
        if !self.honest {
            sleep(Duration::from_millis(1)).await;
            self.flying.clear();
            return;
        }
        // What is held is tried again after seconds, and may fail again.
        let paused_for_ever = 4_000;
        let patient = 4;
        // Pauses that continue hold the queue; they are undone for the time of waiting.
        for _ in 0..3 {
            self.with_queue(Queue::resume);
        }
        for turn in 0..paused_for_ever {
            self.reap();
            if self.flying.is_empty() {
                return;
            }
            if turn == patient {
                self.must_be_whole();
                if !self.words.kicked {
                    self.kick_from_now_on();
                }
            }
            sleep(Duration::from_millis(if turn < patient { 1 } else { 500 })).await;
        }
        panic!("chains {:?} were never answered", self.flying.keys());
    }

    /// A queue that must be looked at would keep the worker from sleeping for long.
    pub(super) fn kick_from_now_on(&mut self) {
        self.words.kicked = true;
        let (me, kick) = (self.words.me, self.words.events.kick.clone());
        worker(0).send(move |local| local.watch(me, Some(kick.as_raw_fd())));
    }

    /// Looks at what has come back.
    pub(super) fn reap(&mut self) {
        if !self.honest {
            return;
        }
        let index = u16::from_le_bytes(self.memory.get(self.used + 2));
        while self.seen != index {
            let entry = u64::from(self.seen & (self.size - 1));
            let element: [u8; 8] = self.memory.get(self.used + 4 + entry * 8);
            let (id, len) = element.split_at(4);
            let id = u32::from_le_bytes(id.try_into().expect("4 bytes"));
            let len = u32::from_le_bytes(len.try_into().expect("4 bytes"));
            let status = u16::try_from(id).ok().and_then(|head| self.flying.remove(&head));
            let Some(status) = status else { panic!("{id} came back and was not in flight") };
            if let Some(bitmap) = &self.bitmap
                && self.logged.remove(&(id as u16))
            {
                for written in [status, self.used + 4 + entry * 8, self.used + 2] {
                    assert!(bitmap.is_marked(written), "{written:#x} was written and not marked");
                }
            }
            let [status] = self.memory.get(status);
            assert!(status <= 2, "chain {id} came back with status {status}");
            if self.must_succeed.take_if(|head| u32::from(*head) == id).is_some() {
                assert!(status == 0 || self.faulty, "the flush came back with status {status}");
                self.long_flushes += 1;
            }
            assert!((1..=0x4000).contains(&len), "chain {id} came back with {len} bytes written");
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// Stops the queue, which must come to its end.
    pub(super) async fn end(&mut self) {
        if self.honest {
            self.settle().await;
            self.must_be_whole();
        }
        let (sender, stopped) = mpsc::channel();
        self.with_queue(|queue| queue.stop(sender, AtStop::Fail));
        self.shared.stopping.set(true);
        for _ in 0..PATIENCE {
            if let Ok(Stopped { base: next, .. }) = stopped.try_recv() {
                assert!(
                    !self.honest || next == self.index,
                    "stopped at {next}, not {}",
                    self.index
                );
                return;
            }
            sleep(Duration::from_millis(1)).await;
        }
        let in_flight = self.shared.queue.borrow().as_ref().map_or(0, Queue::in_flight);
        panic!("the queue does not stop; {in_flight} requests are in flight");
    }
}
