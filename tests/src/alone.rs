//! A process that is the first of a PID namespace of its own, as the engine starts its VMMs.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    process::{Child, Command},
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Starts the command. Only the calling thread's children are affected, and only this one.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let own = File::open("/proc/thread-self/ns/pid")?;
    // What could go wrong with it is descriptors that are no longer shared; these are.
    #[expect(deprecated, reason = "its successor is unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWPID)?;
    let child = command.spawn();
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    child
}
