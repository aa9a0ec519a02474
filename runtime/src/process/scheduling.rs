//! How the kernel schedules the process: CPU scheduler, I/O priority, execution domain.

use std::io;

use oci_spec::runtime::{
    ExecCPUAffinity, IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler,
};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::syscalls::{self, SchedAttr};

/// Why the scheduling could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {what}")]
pub struct SchedulingError {
    what: String,
    source: io::Error,
}

/// `process.execCPUAffinity`, which is for processes that join a container.
#[derive(Debug)]
pub(crate) struct Affinity {
    initial: Option<CpuSet>,
    last: Option<CpuSet>,
}

/// It names CPUs that no kernel has.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no list of CPUs below {max}", max = CpuSet::MAX_CPU)]
pub(crate) struct AffinityError(String);

impl Affinity {
    /// Reads lists such as `0-3,7` (config.md#posix-process).
    pub(crate) fn from_spec(affinity: &ExecCPUAffinity) -> Result<Self, AffinityError> {
        let read = |listed: &Option<String>| {
            let listed = listed.as_ref().filter(|listed| !listed.is_empty());
            listed.map(|listed| cpus(listed).ok_or_else(|| AffinityError(listed.clone()))).transpose()
        };
        Ok(Self { initial: read(affinity.initial())?, last: read(affinity.cpu_affinity_final())? })
    }

    /// Where to be until it is in the container's cgroup.
    pub(crate) fn initial(&self) -> Option<&CpuSet> {
        self.initial.as_ref()
    }

    /// Runs this process where it is to stay.
    pub(crate) fn apply(&self) -> Result<(), SchedulingError> {
        let Some(last) = &self.last else { return Ok(()) };
        sched_setaffinity(None, last).map_err(|errno| SchedulingError {
            what: "process.execCPUAffinity.final".into(),
            source: errno.into(),
        })
    }
}

fn cpus(listed: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for range in listed.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Some(set)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_of_a_list_are_those_of_its_ranges() {
        let set = cpus("0-2,7,1023").unwrap();
        let found: Vec<_> = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect();
        assert_eq!(found, [0, 1, 2, 7, 1023]);
        for listed in ["", "a", "3-1", "1024", "0-18446744073709551615", "1,,2", "-1"] {
            assert!(cpus(listed).is_none(), "{listed}");
        }
    }
}
