//! A device's operations on its disk's thread, and what is known of their requests until they end.
//!
//! What has begun when the driver resets the device is finished, and nobody is told; the rest is given up.

use std::{io, os::fd::RawFd};

use crate::backends::disk::{IoThread, Operation};

/// Operations under way, each with a `T` that its answer needs.
pub struct UnderWay<T> {
    /// Absent where nothing waits.
    thread: Option<IoThread>,
    /// By token.
    pending: Vec<Option<T>>,
}

impl<T> UnderWay<T> {
    /// None yet.
    pub fn new(thread: Option<IoThread>) -> Self {
        Self { thread, pending: Vec::new() }
    }

    /// Whether there is a thread for them.
    pub fn has_thread(&self) -> bool {
        self.thread.is_some()
    }

    /// How many there are, those of a driver that has reset the device included.
    pub fn count(&self) -> usize {
        self.thread.as_ref().map_or(0, IoThread::under_way)
    }

    /// What becomes readable when one ends.
    pub fn fd(&self) -> Option<RawFd> {
        self.thread.as_ref().map(IoThread::fd)
    }

    /// Hands one over. The caller keeps their number within bounds.
    pub fn submit(&mut self, request: T, operation: Operation) {
        let Some(thread) = &mut self.thread else { return };
        let token = self.pending.iter().position(Option::is_none).unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        if let (Some(slot), Ok(token)) = (self.pending.get_mut(token), u16::try_from(token)) {
            *slot = Some(request);
            thread.submit(token, operation);
        }
    }

    /// Whether it is `fd` that is ready; takes its notice then.
    pub fn take_notice(&self, fd: RawFd) -> bool {
        let thread = self.thread.as_ref().filter(|thread| thread.fd() == fd);
        thread.inspect(|thread| thread.take_notice()).is_some()
    }

    /// The next that has ended, and how.
    pub fn next_done(&mut self) -> Option<(T, io::Result<()>)> {
        let thread = self.thread.as_mut()?;
        loop {
            let done = thread.next_done()?;
            // What was begun for a driver that has reset the device since has no slot.
            if let Some(request) = self.pending.get_mut(usize::from(done.token)).and_then(Option::take) {
                return Some((request, done.result));
            }
        }
    }

    /// There is a driver.
    pub fn start(&self) {
        if let Some(thread) = &self.thread {
            thread.cancel(false);
        }
    }

    /// There is none any more: what has not begun does not begin, and the rest has no answer.
    pub fn stop(&mut self) {
        self.pending.clear();
        if let Some(thread) = &self.thread {
            thread.cancel(true);
        }
    }
}
