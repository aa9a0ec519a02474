//! News of processes killed for want of memory, from the kernel.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
};

use rustix::event::PollFlags;

use super::{Cgroup, CgroupError, Layout, files, v1};

/// Something to poll: see [`OomWatch::events`].
#[derive(Debug)]
pub struct OomWatch(Kind);

#[derive(Debug)]
enum Kind {
    /// An eventfd; it is also signalled when the cgroup is removed.
    V1 { event: OwnedFd, memory: PathBuf, seen: u64 },
    /// `memory.events`, which poll(2) reports changes of (kernel: `cgroup-v2.rst`, "memory.events").
    V2 { events: File, seen: u64 },
}

impl OomWatch {
    pub(super) fn new(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        match (cgroup.layout, &cgroup.unified, v1::of(&cgroup.v1, "memory")) {
            (Layout::V2, Some(unified), _) => {
                let path = unified.join("memory.events");
                let events = File::open(&path).map_err(|source| CgroupError::Io {
                    action: "open".into(),
                    path,
                    source,
                })?;
                Ok(Self(Kind::V2 { events, seen: cgroup.oom_kills() }))
            }
            (_, _, Some(memory)) => {
                let event = v1::oom_event(memory)?;
                Ok(Self(Kind::V1 { event, memory: memory.to_owned(), seen: cgroup.oom_kills() }))
            }
            _ => Err(CgroupError::NoController {
                controller: "memory".into(),
                limit: "out-of-memory events",
                reason: ": the container has no memory cgroup".into(),
            }),
        }
    }

    /// What to poll for.
    pub fn events(&self) -> PollFlags {
        match self.0 {
            Kind::V1 { .. } => PollFlags::IN,
            // As any file, it is always readable.
            Kind::V2 { .. } => PollFlags::PRI,
        }
    }

    /// Whether memory has run out since this was asked last.
    pub fn take(&mut self) -> Option<bool> {
        match &mut self.0 {
            Kind::V1 { event, memory, seen } => {
                let mut count = [0; 8];
                let poll = &mut [rustix::event::PollFd::new(event, PollFlags::IN)];
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                let is_signalled = rustix::event::poll(poll, Some(&now)).ok()? > 0;
                if is_signalled {
                    rustix::io::read(&*event, &mut count).ok()?;
                }
                // The kernel signals before it kills, and once more when the cgroup goes away.
                let kills = files::read_field(memory, "memory.oom_control", "oom_kill");
                let is_new = kills.is_some_and(|kills| kills > *seen);
                *seen = kills.unwrap_or(*seen);
                Some(is_new || is_signalled && kills.is_some())
            }
            Kind::V2 { events, seen } => {
                let mut text = [0; 512];
                let count = events.read_at(&mut text, 0).ok()?;
                let text = String::from_utf8_lossy(text.get(..count)?);
                let kills = files::field(&text, "oom_kill")?;
                Some(kills > std::mem::replace(seen, kills))
            }
        }
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::V1 { event, .. } => event.as_fd(),
            Kind::V2 { events, .. } => events.as_fd(),
        }
    }
}
