//! Containers in virtual machines for an OCI runtime's verbs (`cloche_oci`): one VM for each, or for each pod ([`pod`]).
//!
//! ```text
//!  create ── clone3 ──▶ attendant: the process that engines know ── clone3 ──▶ cloche vmm ── KVM ── guest: agent
//!                       carries stdio, waits at the gate,                                            │
//!                       passes signals on, ends as the program does ◀──────────── vsock ─────────────┘
//!  exec ──── clone3 ──▶ attendant of a further process ◀── vsock, by the VMM's socket ───────────────┘
//!  kill, ps, update ──▶ the agent, by the same socket
//! ```
//!
//! All of them are in the container's cgroup on the host. When the first attendant ends, so does the VM, and with it all
//! else; a status is seen as that of a container is.

mod attendant;
mod first;
mod further;
mod member;
pub(super) mod network;
mod pod;
mod spec;

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use cloche_oci::{Child, Error, First, Further, Inside, Isolation, Known, Seen, Status};
use cloche_protocol::{
    frame,
    machine::guest_port,
    message::{Answer, Question, Request},
};
use cloche_runtime::{
    cgroup::{Breadth, Cgroup},
    chain,
};
use cloche_share::additions::Addition;
use oci_spec::runtime::LinuxResources;

use self::{
    pod::{Role, Sandbox},
    spec::In,
};
use super::{dial, machine_of, printable};

pub(super) use pod::listen_in as listen_for_members;

/// A virtual machine around each container.
#[derive(Debug)]
pub struct OciVm;

/// The VM's directory in a container's.
const DIRECTORY: &str = "vm";

fn not_started(error: &dyn std::error::Error) -> Error {
    Error::Start { exit_code: 125, message: chain(error) }
}

/// Refuses what the guest would refuse, too, but only once it is there; and what is left to the host.
fn check(split: &spec::Split, first: &First<'_>) -> Result<(), Error> {
    let mut whole = split.guest.clone();
    let resources = first.spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    if let Some(linux) = whole.linux_mut() {
        linux.set_resources(resources);
    }
    cloche_runtime::check_spec(&whole, first.console_socket.is_some()).map_err(|error| not_started(&error))
}

fn without_preserved(fds: &[i32]) -> Result<(), Error> {
    if fds.is_empty() {
        return Ok(());
    }
    Err(Error::Request("--preserve-fds: open files of the host cannot be given to a virtual machine".into()))
}

impl Isolation for OciVm {
    fn name(&self) -> &'static str {
        "cloche-vm"
    }

    fn enters_containers(&self) -> bool {
        false
    }

    fn launch(&self, first: First<'_>) -> Result<Box<dyn Child>, Error> {
        without_preserved(first.preserved_fds)?;
        if first.keep_groups {
            return Err(Error::Request(
                "annotation run.oci.keep_original_groups: a virtual machine does not know the caller's groups"
                    .into(),
            ));
        }
        match Role::of(first.spec)? {
            Role::Alone => start(&first, In::Own),
            Role::Sandbox { is_declared } => start(&first, In::Pods { is_declared }),
            Role::Member { sandbox, annotation } => {
                let (sandbox, addition) = Sandbox::find(self, first.directory, (&sandbox, annotation))?;
                join_pod(&first, &sandbox, &addition)
            }
        }
    }

    fn join(&self, further: Further<'_>) -> Result<Box<dyn Child>, Error> {
        without_preserved(further.preserved_fds)?;
        refuse_paused_pod(further.known)?;
        let directory = directory(further.known)?;
        let cgroup = further.known.cgroup()?;
        let kept: Vec<_> = further.console_socket.iter().map(AsRawFd::as_raw_fd).collect();
        spec::check_process(further.process)?;
        let mut process = further.process.clone();
        spec::drop_labels(&mut process, further.warn);
        let plan = further::Plan {
            directory: &directory,
            container: pod::is_member(further.known).then(|| further.known.id()),
            process: &process,
            cgroup: match further.cgroup {
                [] => None,
                [path] => Some(path),
                [..] => {
                    return Err(Error::Request(
                        "--cgroup: in a virtual machine there is one hierarchy".into(),
                    ));
                }
            },
            console_socket: further.console_socket,
        };
        let attendant =
            attendant::start(&cgroup, &kept, &|_| Ok(()), 0, |report| further::attend(&plan, report))?;
        Ok(Box::new(attendant))
    }

    fn signal(&self, known: &Known, pidfd: BorrowedFd<'_>, signo: i32) -> Result<(), Error> {
        if signo == libc::SIGKILL {
            // Without asking the guest, which may not want to.
            let killed = cloche_runtime::send_signal(pidfd, signo);
            return killed.map_err(|source| Error::System("kill the virtual machine", source));
        }
        ask(known, &Request::Signal { signo, all: false }).map(drop)
    }

    fn signal_all(&self, known: &Known, signo: i32) -> Result<(), Error> {
        if signo == libc::SIGKILL {
            return Ok(known.cgroup()?.kill_all()?);
        }
        if known.status() == Status::Stopped {
            return Ok(());
        }
        ask(known, &Request::Signal { signo, all: true }).map(drop)
    }

    fn processes(&self, known: &Known) -> Result<Vec<Inside>, Error> {
        if known.status() == Status::Stopped {
            return Ok(Vec::new());
        }
        let Answer::Processes { processes } = ask(known, &Request::Processes)? else {
            return Err(unexpected(known));
        };
        let inside = processes.into_iter().map(|process| Inside {
            pid: process.pid,
            seen: Some(Seen {
                uid: process.uid,
                parent: process.parent,
                command: printable(&process.command).replace('\n', " "),
            }),
        });
        Ok(inside.collect())
    }

    fn give_back(&self, known: &Known) -> Result<(), Error> {
        if pod::is_member(known) {
            let given = pod::give_back(known);
            return given
                .map_err(|source| Error::System("have the pod's file server give its files back", source));
        }
        network::give_back_of(&directory(known)?)
    }

    fn pause(&self, known: &Known) -> Result<(), Error> {
        if !pod::is_member(known) {
            return Ok(known.cgroup()?.freeze()?);
        }
        let frozen = ask(known, &Request::Freeze { freeze: true })
            .and_then(|_| known.cgroup()?.freeze().map_err(Error::from));
        if frozen.is_err() {
            // One that stands still in the guest alone would not be known to.
            let _ = ask(known, &Request::Freeze { freeze: false });
        }
        frozen
    }

    fn resume(&self, known: &Known) -> Result<(), Error> {
        if pod::is_member(known) {
            question(known, &Request::Freeze { freeze: false })?;
        }
        Ok(known.cgroup()?.thaw()?)
    }

    fn update(&self, known: &Known, cgroup: &mut Cgroup, resources: &LinuxResources) -> Result<(), Error> {
        let (host, guest) = match pod::sandbox_of(known) {
            Some(sandbox) => (None, Some(spec::of_member(resources, &sandbox)?)),
            None => spec::divide_update(resources),
        };
        if let Some(guest) = guest {
            let resources = serde_json::to_string(&guest)
                .map_err(|error| Error::System("write the limits down", error.into()))?;
            ask(known, &Request::Update { resources })?;
        }
        host.map_or(Ok(()), |host| Ok(cgroup.update(known.cgroup_path(), &host)?))
    }
}

/// Takes a container's configuration apart, and prepares its root file system.
fn split(first: &First<'_>, place: In<'_>) -> Result<spec::Split, Error> {
    let mut split = spec::split(first.spec, first.rootfs, place)?;
    if let Some(process) = split.guest.process_mut() {
        spec::drop_labels(process, first.warn);
    }
    if let Some(linux) = split.guest.linux_mut() {
        spec::drop_mount_label(linux, first.warn);
    }
    check(&split, first)?;
    if first.spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true)) {
        // Nothing is to be made in it any more, so that the file server, too, can keep it as it is.
        let made = cloche_runtime::make_mount_points(first.rootfs, first.spec);
        split.shares[spec::ROOT_SHARE].read_only =
            made.map_err(|source| Error::System("make mount points in the root file system", source))?;
    }
    Ok(split)
}

/// Boots a machine with a container in it.
fn start(first: &First<'_>, place: In<'_>) -> Result<Box<dyn Child>, Error> {
    let split = split(first, place)?;
    let failed = |action| {
        let path = first.directory.to_owned();
        move |source| Error::File { action, path, source }
    };
    let directory = first.directory.canonicalize().map_err(failed("find"))?.join(DIRECTORY);
    fs::DirBuilder::new().mode(0o700).create(&directory).map_err(failed("make the VM's directory in"))?;
    let machine =
        machine_of(&directory, split.memory_bytes, split.vcpus, None).map_err(|error| not_started(&error))?;
    let path = cloche_runtime::cgroup_path(first.spec, first.id);
    let plan = first::Plan {
        id: first.id,
        directory: &directory,
        split: &split,
        is_sandbox: !matches!(place, In::Own),
        machine,
        cgroup: &path,
        gate: first.gate,
        console_socket: first.console_socket,
    };
    let network = if split.network.is_none() { attendant::NEW_NETWORK } else { 0 };
    attended(first, &split.host, &[], attendant::NEW_PID | network, |report| first::attend(plan, report))
}

/// Makes a container in a sandbox's machine.
fn join_pod(first: &First<'_>, sandbox: &Sandbox, addition: &Addition) -> Result<Box<dyn Child>, Error> {
    let split = split(first, In::With(sandbox))?;
    let link = sandbox.link(first.directory)?;
    let plan = member::Plan {
        id: first.id,
        sandbox: sandbox.pid,
        directory: &link.canonicalize().map_err(|source| Error::File {
            action: "find",
            path: link,
            source,
        })?,
        split: &split,
        addition,
        gate: first.gate,
        console_socket: first.console_socket,
    };
    attended(first, &split.host, &[addition.socket()], 0, |report| member::attend(&plan, report))
}

/// Starts a container's first attendant in the container's cgroup on the host, with these limits, descriptors and new
/// namespaces.
fn attended(
    first: &First<'_>,
    host: &LinuxResources,
    kept: &[BorrowedFd<'_>],
    namespaces: u64,
    attend: impl FnOnce(attendant::Report) -> Result<u8, attendant::Refusal>,
) -> Result<Box<dyn Child>, Error> {
    let cgroup =
        Cgroup::create(&cloche_runtime::cgroup_path(first.spec, first.id), Some(host), Breadth::All)?;
    let kept = [first.gate, first.console_socket].into_iter().flatten().chain(kept.iter().copied());
    let kept: Vec<_> = kept.map(|fd| fd.as_raw_fd()).collect();
    let created = |pid: i32| (first.created)(pid, &cgroup);
    match attendant::start(&cgroup, &kept, &created, namespaces, attend) {
        Ok(attendant) => Ok(Box::new(FirstAttended { attendant, cgroup })),
        Err(error) => {
            let _ = cgroup.kill_all();
            let _ = cgroup.delete();
            Err(error)
        }
    }
}

/// A container's first attendant, and what holds it and, if it is the first of its machine, the VM.
struct FirstAttended {
    attendant: attendant::Attendant,
    cgroup: Cgroup,
}

impl Child for FirstAttended {
    fn pid(&self) -> i32 {
        self.attendant.pid()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.attendant.pidfd()
    }

    fn wait(&mut self) -> Result<cloche_runtime::ExitStatus, Error> {
        self.attendant.wait()
    }

    fn discard(self: Box<Self>) {
        Box::new(self.attendant).discard();
        let _ = self.cgroup.kill_all();
        let _ = self.cgroup.delete();
    }
}

fn directory(known: &Known) -> Result<PathBuf, Error> {
    let path = known.directory();
    path.canonicalize().map(|path| path.join(DIRECTORY)).map_err(|source| Error::File {
        action: "find",
        path: path.to_owned(),
        source,
    })
}

fn unexpected(known: &Known) -> Error {
    let source =
        io::Error::other(format!("it gave an answer to something else; is {} still well?", known.id()));
    Error::System("understand the guest's agent", source)
}

/// Asks a container's agent.
fn ask(known: &Known, request: &Request) -> Result<Answer, Error> {
    match known.status() {
        Status::Stopped => return Err(Error::NotRunning(known.id().to_owned(), "stopped")),
        Status::Paused => {
            let id = known.id();
            return Err(Error::Request(format!(
                "container {id} is paused, and its virtual machine does not answer; resume it first"
            )));
        }
        _ => {}
    }
    question(known, request)
}

/// With its sandbox, a pod's machine stands still, and answers nobody.
fn refuse_paused_pod(known: &Known) -> Result<(), Error> {
    match pod::paused_sandbox(&OciVm, known) {
        Some(sandbox) => Err(Error::Request(format!(
            "the pod's sandbox {sandbox} is paused, and with it the virtual machine of all its containers; resume it first"
        ))),
        None => Ok(()),
    }
}

fn question(known: &Known, request: &Request) -> Result<Answer, Error> {
    refuse_paused_pod(known)?;
    let container = pod::is_member(known).then(|| known.id().to_owned());
    match ask_at(&directory(known)?, &Question { container, request: request.clone() }) {
        Ok(Answer::Failed { message }) => Err(Error::Request(printable(&message))),
        Ok(answer) => Ok(answer),
        // It has ended meanwhile.
        Err(_) if known.status() == Status::Stopped => {
            Err(Error::NotRunning(known.id().to_owned(), "stopped"))
        }
        Err(source) => Err(Error::System("ask the guest's agent", source)),
    }
}

fn ask_at(directory: &Path, question: &Question) -> io::Result<Answer> {
    let stream = dial::connect(directory, guest_port::REQUESTS)?;
    frame::write(&stream, question).map_err(io::Error::other)?;
    let answer = frame::read(dial::answer(&stream)).map_err(io::Error::other)?;
    answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
