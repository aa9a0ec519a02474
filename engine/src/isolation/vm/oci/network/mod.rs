//! The interfaces of a network namespace of the host, handed on to a guest.
//!
//! ```text
//!  namespace of the host (the engine's)                          guest                     container
//!   eth0, a veth ◀── tc: all that comes in ──▶ tap ── VMM ── virtio-net "eth0" ──moved──▶ eth0
//! ```
//! The veth and its addresses stay: engines look at them, and take them away. But its kernel sees none of the frames
//! any more, since what comes in is redirected before. The guest's device has the veth's address, and the container's
//! interface its name, MTU, addresses, routes and permanent neighbours: the kernel's own messages about these, as far
//! as they describe what somebody has set, sent again in the container's namespace with another index ([`settings`]).
//!
//! Whoever else is in the namespace would be cut off, so a namespace that is in use is refused.
//!
//! The tap ends with the VMM. What leads to it is taken back by whoever took it over, and if that was killed, by
//! `delete`, for which it is written down.

mod netlink;
mod settings;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use cloche_oci::Error;
use cloche_vmm::config::{MAX_NETS, MacAddress, NetBackend, NetConfig};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use self::{
    netlink::{Kernel, Message, flag},
    settings::{GuestMessages, Link},
};
use super::attendant::Refusal;

/// linux/rtnetlink.h.
mod kind {
    pub(super) const NEW_LINK: u16 = 16;
    pub(super) const NEW_QDISC: u16 = 36;
    pub(super) const DELETE_QDISC: u16 = 37;
    pub(super) const NEW_FILTER: u16 = 44;
}

/// Of tunnels, in every namespace while their drivers are loaded; down.
const FALLBACKS: [&str; 9] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];
/// What our taps' names begin with.
const TAP: &str = "cloche-tap";
/// Where it is written down, in the VM's directory.
const RECORD: &str = "network.json";

/// Joins a network namespace of the host, unless it is the host's own, whose interfaces are not for one guest. Before a
/// start a namespace has no interfaces of an engine's yet, so what is in it is looked at by [`Network::take_over`].
pub(super) fn join(path: &Path) -> Result<(), Refusal> {
    let failed = |error: io::Error| {
        Refusal::new(format!("cannot join the network namespace {}: {error}", path.display()))
    };
    let namespace = File::open(path).map_err(failed)?;
    let identity = identity(&namespace.metadata().map_err(failed)?);
    // What may not be looked at is not this one's either, as far as can be told.
    let is_of = |process: &str| identity_of(Path::new(process)).is_some_and(|other| other == identity);
    if is_of("/proc/self/ns/net") || is_of("/proc/1/ns/net") {
        return Err(Refusal::new(format!(
            "the network namespace {} is the host's, and a virtual machine that took its interfaces over would cut the host \
             off; use a network of the container's own or none, or cloche-container",
            path.display()
        )));
    }
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| failed(errno.into()))
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn identity_of(namespace: &Path) -> Option<(u64, u64)> {
    fs::metadata(namespace).ok().as_ref().map(identity)
}

/// Refuses a namespace, that of this process, in which there is another process: what comes in would go to the guest only.
/// Those of engines and plugins are empty until the container is there. Processes that this one may not look at are
/// not seen.
fn refuse_shared(path: &Path, interface: &str) -> Result<(), Refusal> {
    let step = Refusal::step("look who is in the container's network namespace");
    // Numbers are those of this /proc, not those of this process's own PID namespace.
    let Some((own, here)) = fs::read_link("/proc/self").ok().zip(identity_of(Path::new("/proc/self/ns/net")))
    else {
        return Err(step(io::Error::other("there is no /proc")));
    };
    let other = fs::read_dir("/proc").map_err(step)?.flatten().find(|entry| {
        let name = entry.file_name();
        let is_process = name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        is_process && name != own.as_os_str() && identity_of(&entry.path().join("ns/net")) == Some(here)
    });
    let Some(other) = other else { return Ok(()) };
    let command = fs::read(other.path().join("comm")).unwrap_or_default();
    Err(Refusal::new(format!(
        "the network namespace {} is in use by process {} ({}), which would be cut off: all that comes in at {interface} \
         would go to the virtual machine; give it a network of its own, or use cloche-container",
        path.display(),
        other.file_name().display(),
        String::from_utf8_lossy(&command).trim_end().escape_debug(),
    )))
}

/// What was taken over. Dropping it gives it back.
#[derive(Debug)]
pub(in super::super) struct Network {
    kernel: Kernel,
    /// Interfaces with a redirection of ours.
    redirected: Vec<i32>,
    /// The namespace's path and the place to write it down at, if it can outlive this process.
    record: Option<(PathBuf, PathBuf)>,
    nets: Vec<(NetConfig, OwnedFd)>,
    messages: GuestMessages,
}

/// As it is written down.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    namespace: PathBuf,
    /// Device and inode, lest it is another one by then.
    identity: (u64, u64),
    redirected: Vec<i32>,
}

impl Network {
    /// Takes over the interfaces of this process's network namespace. `path` is its place, if it has one and so can
    /// outlive this process; `directory` is the VM's.
    pub(super) fn take_over(path: Option<&Path>, directory: &Path) -> Result<Self, Refusal> {
        let kernel = Kernel::here().map_err(Refusal::step("look at the container's network"))?;
        let links = settings::links(&kernel).map_err(Refusal::step("list the container's interfaces"))?;
        let wanted = passed_on(links)?;
        if let (Some(path), Some(first)) = (path, wanted.first()) {
            refuse_shared(path, &first.name)?;
        }
        let messages = settings::for_guest(&kernel, &wanted)?;
        let record = path.map(|path| (path.to_owned(), directory.join(RECORD)));
        let mut network = Self { kernel, redirected: Vec::new(), record, nets: Vec::new(), messages };
        for link in &wanted {
            network.connect(link)?;
        }
        Ok(network)
    }

    /// Makes a tap, and leads to it what comes in at the interface, and back.
    fn connect(&mut self, link: &Link) -> Result<(), Refusal> {
        // First, since it shows whose the interface is.
        self.kernel.change(ingress(kind::NEW_QDISC, link.index)).map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::AlreadyExists {
                "; it has an ingress queueing discipline already, perhaps of another virtual machine in the same \
                 network namespace: give each its own"
            } else {
                "; the host's kernel needs sch_ingress (CONFIG_NET_SCH_INGRESS)"
            };
            Refusal::new(format!("cannot redirect what comes in at interface {}: {error}{hint}", link.name))
        })?;
        self.redirected.push(link.index);
        if let Some((namespace, path)) = &self.record {
            write_down(namespace, &self.redirected, path)
                .map_err(Refusal::step("write the container's network down"))?;
        }
        let name = format!("{TAP}{}", self.nets.len());
        let failed = |what: &'static str| {
            let interface = link.name.clone();
            move |error: io::Error| Refusal::new(format!("cannot {what} for interface {interface}: {error}"))
        };
        let tap = cloche_vmm::attach_tap(&name)
            .map_err(|error| Refusal::new(format!("the tap {name}: {}", cloche_runtime::chain(&error))))?;
        let links = settings::links(&self.kernel).map_err(failed("find the tap"))?;
        let made = links.iter().find(|made| made.name == name);
        let index = made.ok_or_else(|| Refusal::new(format!("the tap {name} is gone")))?.index;
        for message in [
            settings::configure(index, None, link.mtu, settings::knows_inet6()),
            settings::bring_up(index),
            ingress(kind::NEW_QDISC, index),
        ] {
            self.kernel.change(message).map_err(failed("set up a tap"))?;
        }
        for (from, to) in [(link.index, index), (index, link.index)] {
            self.kernel.change(redirect(from, to)).map_err(|error| {
                Refusal::new(format!(
                    "cannot redirect what comes in at interface {}: {error}; the host's kernel needs cls_matchall and \
                     act_mirred (CONFIG_NET_CLS_MATCHALL, CONFIG_NET_ACT_MIRRED)",
                    link.name
                ))
            })?;
        }
        let net = NetConfig {
            // Its number is known when it is inherited.
            backend: NetBackend::TapFd(-1),
            mac: MacAddress(link.address),
            mtu: Some(link.mtu),
            receive_limit: None,
            send_limit: None,
        };
        self.nets.push((net, tap));
        Ok(())
    }

    /// The VM's devices. `inherit` tells under which number it will have a descriptor.
    pub(in super::super) fn devices(
        &self,
        inherit: &mut dyn FnMut(OwnedFd) -> i32,
    ) -> io::Result<Vec<NetConfig>> {
        let devices = self.nets.iter().map(|(net, tap)| {
            let backend = NetBackend::TapFd(inherit(tap.try_clone()?));
            Ok(NetConfig { backend, ..net.clone() })
        });
        devices.collect()
    }

    /// What the guest's agent has to send to its kernel; see `cloche_protocol::boot`.
    pub(in super::super) fn messages(&self) -> Option<&GuestMessages> {
        (!self.nets.is_empty()).then_some(&self.messages)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        give_back(&self.kernel, &self.redirected);
        // From here on they may be somebody else's.
        if let Some((_, path)) = &self.record {
            let _ = fs::remove_file(path);
        }
    }
}

/// Those of the interfaces that a guest gets. One that it would not get is refused.
fn passed_on(links: Vec<Link>) -> Result<Vec<Link>, Refusal> {
    // Another VM's tap is no hindrance by itself: its interface is, and tells it better.
    let is_left_out = |link: &Link| {
        link.is_loopback || FALLBACKS.contains(&link.name.as_str()) || link.name.starts_with(TAP)
    };
    let mut wanted: Vec<Link> = links.into_iter().filter(|link| !is_left_out(link)).collect();
    wanted.sort_by_key(|link| link.index);
    if let Some(other) = wanted.iter().find(|link| link.kind != "veth") {
        let kind = if other.kind.is_empty() { "physical" } else { &other.kind };
        return Err(Refusal::new(format!(
            "interface {} of its network namespace is of the kind {kind}, and a virtual machine is given veth interfaces \
             only, as bridged networks have; use such a network, none at all, or cloche-container",
            other.name
        )));
    }
    if wanted.len() > MAX_NETS {
        return Err(Refusal::new(format!(
            "its network namespace has {} interfaces, and a virtual machine can have {MAX_NETS}",
            wanted.len()
        )));
    }
    Ok(wanted)
}

/// The queueing discipline through which all goes that comes in at an interface (tc(8), linux/pkt_sched.h).
fn ingress(kind: u16, interface: i32) -> Message {
    const PARENT: u32 = 0xffff_fff1;
    let flags = if kind == kind::NEW_QDISC { flag::CREATE | flag::EXCLUSIVE } else { 0 };
    let header = traffic_control(interface, INGRESS, PARENT, 0);
    Message::new(kind, flags | flag::ACK, &header).with_name(1, "ingress")
}

/// The handle of that discipline.
const INGRESS: u32 = 0xffff_0000;

/// Leads all that comes in at one interface out by another (tc-matchall(8), tc-mirred(8)).
fn redirect(from: i32, to: i32) -> Message {
    // linux/rtnetlink.h: TCA_KIND, TCA_OPTIONS. linux/pkt_cls.h: TCA_MATCHALL_ACT, TCA_ACT_KIND, TCA_ACT_OPTIONS.
    // linux/tc_act/tc_mirred.h: TCA_MIRRED_PARMS, TCA_EGRESS_REDIR.
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const MATCHALL_ACTIONS: u16 = 2;
    const MIRRED_PARAMETERS: u16 = 2;
    const EGRESS_REDIRECT: i32 = 1;
    const STOLEN: i32 = 4;
    const FIRST: u32 = 1 << 16;
    /// Of any protocol (linux/if_ether.h), in network byte order.
    const ALL: u32 = 0x0003_u16.to_be() as u32;
    // index, capab, action, refcnt, bindcnt, eaction, ifindex.
    let parameters = [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, to].map(i32::to_ne_bytes).concat();
    Message::new(
        kind::NEW_FILTER,
        flag::CREATE | flag::EXCLUSIVE | flag::ACK,
        &traffic_control(from, 0, INGRESS, FIRST | ALL),
    )
    .with_name(KIND, "matchall")
    .nesting(OPTIONS, |options| {
        options.nesting(MATCHALL_ACTIONS, |actions| {
            actions.nesting(1, |action| {
                action
                    .with_name(KIND, "mirred")
                    .nesting(OPTIONS, |options| options.with(MIRRED_PARAMETERS, &parameters))
            })
        })
    })
}

/// `struct tcmsg`.
fn traffic_control(interface: i32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let numbers = [handle, parent, info].map(u32::to_ne_bytes);
    [&[0; 4], interface.to_ne_bytes().as_slice(), &numbers.concat()].concat()
}

/// Takes redirections away. Of an interface that is gone, they are gone too.
fn give_back(kernel: &Kernel, redirected: &[i32]) {
    for interface in redirected {
        let _ = kernel.change(ingress(kind::DELETE_QDISC, *interface));
    }
}

fn write_down(namespace: &Path, redirected: &[i32], path: &Path) -> io::Result<()> {
    let identity = identity(&fs::metadata(namespace)?);
    let record = Record { namespace: namespace.to_owned(), identity, redirected: redirected.to_vec() };
    fs::write(path, serde_json::to_vec(&record)?)
}

/// Gives back what the VM with this directory, which has ended, had taken over, if nobody did yet and it is still there.
pub(super) fn give_back_of(directory: &Path) -> Result<(), Error> {
    let Ok(record) = fs::read(directory.join(RECORD)) else { return Ok(()) };
    let Ok(record) = serde_json::from_slice::<Record>(&record) else { return Ok(()) };
    let Ok(namespace) = File::open(&record.namespace) else { return Ok(()) };
    let is_same = namespace.metadata().is_ok_and(|metadata| identity(&metadata) == record.identity);
    if !is_same {
        return Ok(());
    }
    // A thread of its own, since it does not come back.
    let result = std::thread::scope(|scope| {
        let work = || -> io::Result<()> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let kernel = Kernel::here()?;
            // Ours has ended with its VMM. One that is there is another's, and the namespace perhaps a new one: a kernel
            // uses inodes' numbers again.
            if !settings::links(&kernel)?.iter().any(|link| link.name.starts_with(TAP)) {
                give_back(&kernel, &record.redirected);
            }
            Ok(())
        };
        scope.spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    });
    result.map_err(|source| Error::System("give the interfaces of its network namespace back", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: i32, name: &str, kind: &str) -> Link {
        Link {
            index,
            name: name.into(),
            kind: kind.into(),
            address: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            is_up: true,
            is_loopback: name == "lo",
        }
    }

    #[test]
    fn only_veths_are_passed_on_in_their_order() {
        let links = vec![
            link(9, "eth1", "veth"),
            link(1, "lo", ""),
            link(4, "cloche-tap0", "tun"),
            link(2, "tunl0", "ipip"),
            link(3, "eth0", "veth"),
        ];
        let names: Vec<_> = passed_on(links).unwrap().into_iter().map(|link| link.name).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        let refusal = |links| passed_on(links).unwrap_err().message;
        assert!(
            refusal(vec![link(3, "eth0", "ipvlan")])
                .contains("interface eth0 of its network namespace is of the kind ipvlan")
        );
        assert!(refusal(vec![link(3, "eno1", "")]).contains("of the kind physical"));
        let many = (1..=5).map(|index| link(index, &format!("eth{index}"), "veth")).collect();
        assert!(refusal(many).contains("has 5 interfaces, and a virtual machine can have 4"));
    }

    #[test]
    fn redirection_is_as_tc_writes_it() {
        let bytes = redirect(3, 5).into_bytes();
        // Interface, handle, parent, priority 1 and protocol.
        assert_eq!(bytes[16..36], [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 3, 1, 0]);
        assert_eq!(bytes.last_chunk(), Some(&[1, 0, 0, 0, 5, 0, 0, 0]));
        let bytes = ingress(kind::DELETE_QDISC, 3).into_bytes();
        assert_eq!(bytes[24..32], [0, 0, 0xff, 0xff, 0xf1, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn record_of_a_namespace_that_is_another_one_or_gone_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        give_back_of(directory.path()).unwrap();
        let path = directory.path().join(RECORD);
        write_down(Path::new("/proc/self/ns/net"), &[1], &path).unwrap();
        let mut record: Record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record.identity.1 += 1;
        fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        give_back_of(directory.path()).unwrap();
        record.namespace = "/not/there".into();
        fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        give_back_of(directory.path()).unwrap();
    }
}
