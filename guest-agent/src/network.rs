//! Gives the container the VM's network devices, by messages that the host has written for this kernel (rtnetlink(7)).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use cloche_protocol::boot::{LINKS_PATH, NETWORK_PATH};
use rustix::{
    io::retry_on_intr,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// Whether there are any.
pub fn is_given() -> bool {
    Path::new(LINKS_PATH).exists()
}

/// Moves the devices to the network namespace of this process, and sets them up there.
pub fn hand_over(pid: i32) -> io::Result<()> {
    let own = File::open("/proc/self/ns/net")?;
    let theirs = File::open(format!("/proc/{pid}/ns/net"))?;
    send_all(LINKS_PATH, Some(pid))?;
    enter(&theirs)?;
    let sent = send_all(NETWORK_PATH, None);
    enter(&own)?;
    sent
}

fn enter(namespace: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Sends a file's messages, each once the one before it is answered, and completed by a namespace's process.
fn send_all(path: &str, pid: Option<i32>) -> io::Result<()> {
    /// linux/if_link.h: IFLA_NET_NS_PID, behind its length.
    const NAMESPACE: [u8; 4] = [8, 0, 19, 0];
    let bytes = std::fs::read(path)?;
    // NETLINK_ROUTE is the default, 0.
    let kernel = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let mut rest = bytes.as_slice();
    while let Some(length) = rest.first_chunk() {
        let at = bytes.len() - rest.len();
        let length = u32::from_ne_bytes(*length) as usize;
        let (message, behind) = rest.split_at_checked(length).ok_or(io::ErrorKind::InvalidData)?;
        let mut message = message.to_vec();
        if let Some(pid) = pid {
            message.extend(NAMESPACE);
            message.extend(pid.to_ne_bytes());
            let length = (message.len() as u32).to_ne_bytes();
            message.splice(..length.len(), length);
        }
        ask(&kernel, &message)
            .map_err(|error| io::Error::other(format!("message at {at} of {path}: {error}")))?;
        rest = behind;
    }
    Ok(())
}

fn ask(kernel: &OwnedFd, message: &[u8]) -> io::Result<()> {
    send(kernel, message, SendFlags::empty())?;
    // Behind a header of 16 bytes: 0, or an error's number, negative (linux/netlink.h: NLMSG_ERROR).
    let mut answer = [0; 20];
    retry_on_intr(|| recv(kernel, &mut answer[..], RecvFlags::empty()))?;
    let [.., c0, c1, c2, c3] = answer;
    match i32::from_ne_bytes([c0, c1, c2, c3]) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
