//! How the kernel schedules the process: CPU scheduler, I/O priority, execution domain.

use std::io;

use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    Process, Scheduler,
};

use crate::syscalls::{self, SchedAttr};

/// Why the scheduling could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {what}")]
pub struct SchedulingError {
    what: String,
    source: io::Error,
}

/// Applies `process.scheduler` and `process.ioPriority`.
pub(crate) fn apply(process: &Process) -> Result<(), SchedulingError> {
    if let Some(scheduler) = process.scheduler() {
        let what = format!("process.scheduler to {:?}", scheduler.policy());
        syscalls::sched_setattr(&attributes(scheduler)).map_err(|source| SchedulingError { what, source })?;
    }
    if let Some(priority) = process.io_priority() {
        let (class, level) = (priority.class(), priority.priority());
        let what = format!("process.ioPriority to {class} {level}");
        let set = match (number(class), u16::try_from(level)) {
            // The kernel has 8 levels (ioprio_set(2)).
            (class, Ok(level @ 0..8)) => syscalls::ioprio_set(class << 13 | u32::from(level)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        set.map_err(|source| SchedulingError { what, source })?;
    }
    Ok(())
}

/// `IOPRIO_CLASS_…` of `linux/ioprio.h`.
fn number(class: IOPriorityClass) -> u32 {
    match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    }
}

fn attributes(scheduler: &Scheduler) -> SchedAttr {
    // `SCHED_…` and `SCHED_FLAG_…` of `linux/sched.h`.
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    SchedAttr {
        policy,
        flags: scheduler.flags().iter().flatten().map(flag).fold(0, |flags, flag| flags | flag),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0) as u32,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedAttr::default()
    }
}

/// Sets the execution domain (personality(2)).
pub(crate) fn set_personality(personality: &LinuxPersonality) -> Result<(), SchedulingError> {
    // `PER_…` of `linux/personality.h`.
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 0x0008,
    };
    syscalls::set_personality(domain)
        .map_err(|source| SchedulingError { what: "linux.personality".into(), source })
}
