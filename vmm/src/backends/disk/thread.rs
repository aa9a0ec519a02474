//! A disk's thread: it carries out, one after the other, what may have to wait.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{file::Disk, operation::Operation};
use crate::mailbox::{Receiver, Sender, mailbox};

/// What a disk's thread does until its [`IoThread`] is dropped.
pub type Work = Box<dyn FnOnce() + Send>;

/// The thread's end that the event loop holds.
pub struct IoThread {
    jobs: Option<Sender<(u16, Operation)>>,
    done: Receiver<Done>,
    /// Readable when something is done.
    wake: EventFd,
    under_way: usize,
    /// What has not begun is not begun any more.
    cancel: Arc<AtomicBool>,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Done {
    /// By which name it was submitted.
    pub token: u16,
    /// How it ended.
    pub result: io::Result<()>,
}

impl IoThread {
    /// For this disk, and what a thread has to do for it.
    pub fn new(disk: Arc<Disk>) -> io::Result<(Self, Work)> {
        let (jobs, given) = mailbox::<(u16, Operation)>();
        let (report, done) = mailbox();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let waker = wake.try_clone()?;
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = cancel.clone();
        let work = move || {
            while let Some((token, mut operation)) = given.recv() {
                let result = if cancelled.load(Ordering::Acquire) {
                    Err(io::ErrorKind::Interrupted.into())
                } else {
                    disk.perform(&mut operation)
                };
                // The guest's buffers are let go before anybody hears that nothing touches them any more.
                drop(operation);
                if report.send(Done { token, result }).is_err() {
                    return;
                }
                let _ = waker.write(1);
            }
        };
        Ok((Self { jobs: Some(jobs), done, wake, under_way: 0, cancel }, Box::new(work)))
    }

    /// Hands over an operation. The caller keeps their number within bounds.
    pub fn submit(&mut self, token: u16, operation: Operation) {
        // It fails only if the thread has panicked, and then nothing is ever done: the guest's request hangs.
        if let Some(jobs) = &self.jobs
            && jobs.send((token, operation)).is_ok()
        {
            self.under_way += 1;
        }
    }

    /// The next operation that has ended; `None` if there is none now.
    pub fn next_done(&mut self) -> Option<Done> {
        let done = self.done.try_recv()?;
        self.under_way = self.under_way.saturating_sub(1);
        Some(done)
    }

    /// Operations that have not been reported as done.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// What becomes readable when something is done. Read it before asking.
    pub fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Takes the notice that something is done.
    pub fn take_notice(&self) {
        let _ = self.wake.read();
    }

    /// Whether what was submitted and has not begun is to be given up: it ends as interrupted.
    pub fn cancel(&self, cancel: bool) {
        self.cancel.store(cancel, Ordering::Release);
    }
}

impl Drop for IoThread {
    /// Waits for the operation that has begun, if any: after this nothing touches guest memory or the file.
    fn drop(&mut self) {
        self.cancel(true);
        drop(self.jobs.take());
        // A thread without work ends by itself, and a VM's end need not wait for it.
        if self.under_way > 0 {
            while self.done.recv().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        path::Path,
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::backends::disk::{DiskOptions, Extent};

    fn disk(path: &Path) -> Arc<Disk> {
        Arc::new(Disk::open(path, DiskOptions::default()).unwrap())
    }

    fn start(path: &Path) -> IoThread {
        let (thread, work) = IoThread::new(disk(path)).unwrap();
        thread::spawn(work);
        thread
    }

    fn next(thread: &mut IoThread) -> Done {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(done) = thread.next_done() {
                return done;
            }
            assert!(Instant::now() < deadline, "nothing was done");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn zeroes(offset: u64) -> Operation {
        let extents = vec![Extent { offset, bytes: 512, may_unmap: false }];
        Operation::WriteZeroes { extents, durable: false }
    }

    #[test]
    fn operations_are_done_in_order_and_told_by_the_eventfd() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        let mut thread = start(file.path());
        for token in 0..4 {
            thread.submit(token, zeroes(u64::from(token) * 1024));
        }
        for token in 0..4 {
            let done = next(&mut thread);
            assert!(done.token == token && done.result.is_ok(), "{done:?}");
        }
        assert_eq!(thread.under_way(), 0);
        assert!(thread.wake.read().is_ok());
        let expected: Vec<u8> = (0..4096).map(|at| u8::from(at % 1024 >= 512)).collect();
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
    }

    #[test]
    fn operations_after_cancel_change_nothing_and_are_reported() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        let mut thread = start(file.path());
        thread.cancel(true);
        thread.submit(7, zeroes(0));
        let done = next(&mut thread);
        assert!(done.token == 7 && done.result.is_err());
        thread.cancel(false);
        thread.submit(8, zeroes(512));
        assert!(next(&mut thread).result.is_ok());
        thread.submit(9, zeroes(1024));
        drop(thread);
        let content = std::fs::read(file.path()).unwrap();
        assert_eq!((content[0], content[512]), (1, 0));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(std::fs::read(file.path()).unwrap(), content, "something was written after the end");
    }
}
