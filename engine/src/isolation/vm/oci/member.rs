//! The attendant of a container that joins a pod: it brings the container's files to the machine's file server, has the
//! guest's agent make it beside the sandbox, and attends it. The files stay for as long as this process does.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use cloche_oci::Signals;
use cloche_protocol::message::{FromGuest, Question, Request, ToGuest};
use cloche_runtime::Filter;
use cloche_share::additions::Addition;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{
    super::START_PATIENCE,
    attendant::{self, Gate, Peer, Refusal, Report},
    first::terminal,
    further::ask,
    spec::{ROOT_SHARE, Split},
};

/// What to make.
pub(super) struct Plan<'a> {
    pub(super) id: &'a str,
    /// The sandbox's process on the host.
    pub(super) sandbox: i32,
    /// The sandbox's VM.
    pub(super) directory: &'a Path,
    pub(super) split: &'a Split,
    pub(super) addition: &'a Addition,
    pub(super) gate: Option<BorrowedFd<'a>>,
    pub(super) console_socket: Option<BorrowedFd<'a>>,
}

/// Makes a container in the sandbox's machine, and attends it to its end; how its first process ended.
pub(super) fn attend(plan: &Plan<'_>, report: Report) -> Result<u8, Refusal> {
    // Hooks, and whoever else enters it, find the pod's.
    let network = File::open(format!("/proc/{}/ns/net", plan.sandbox));
    let network = network.map_err(Refusal::step("open the network namespace of the pod's sandbox"))?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(Refusal::step("join the network namespace of the pod's sandbox"))?;
    report.hold()?;
    // Hooks may have mounted something by now.
    plan.addition.add(&plan.split.shares).map_err(|error| Refusal::of(&error))?;
    let gate = match plan.gate {
        Some(gate) => Some(gate.try_clone_to_owned().map_err(Refusal::step("keep the gate"))?),
        None => None,
    };
    let signals = Signals::collect().map_err(Refusal::step("collect signals"))?;
    let spec = serde_json::to_string(&plan.split.guest).map_err(|error| Refusal::of(&error))?;
    let request = Request::Create {
        id: plan.id.to_owned(),
        spec,
        filter: plan.split.filter.as_ref().map(Filter::to_bytes),
        root_share: plan.addition.first() + ROOT_SHARE,
    };
    let process = plan.split.guest.process().clone().unwrap_or_default();
    let terminal = terminal(&process, plan.console_socket)?;
    let question = Question { container: None, request };
    let (mut control, carried) = ask(plan.directory, &question, terminal)?;
    control.is_container = true;
    control.expect(&FromGuest::Created, Some(START_PATIENCE))?;
    if gate.is_none() {
        control.tell(&ToGuest::Start);
        control.expect(&FromGuest::Started, Some(START_PATIENCE))?;
    }
    control.listen()?;
    report.ready()?;
    attendant::attend(&mut control, carried, &signals, gate.map(Gate::new))
        .map_err(Refusal::step("attend the container"))
}
