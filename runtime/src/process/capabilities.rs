//! The five capability sets of a process (capabilities(7)).

use std::io;

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::{
    io::Errno,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    },
};

/// Why the capabilities could not be set.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// The spec asks for capabilities that the caller does not have to give.
    #[error("cannot grant {0}: this process does not have it itself; take it out of process.capabilities")]
    NotHeld(String),
    /// The kernel refused.
    #[error("cannot {action}")]
    Set {
        /// What was attempted.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The sets of a spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

impl Sets {
    const EMPTY: Self = {
        let empty = CapabilitySet::empty();
        Self { bounding: empty, effective: empty, permitted: empty, inheritable: empty, ambient: empty }
    };

    /// Without `process.capabilities` the process has none.
    pub(crate) fn from_spec(listed: Option<&LinuxCapabilities>) -> Self {
        let Some(listed) = listed else { return Self::EMPTY };
        Self {
            bounding: set(listed.bounding()),
            effective: set(listed.effective()),
            permitted: set(listed.permitted()),
            inheritable: set(listed.inheritable()),
            ambient: set(listed.ambient()),
        }
    }

    /// Takes out what this process could not give (config.md#linux-process: "Runtimes SHOULD NOT fail if the container
    /// configuration requests capabilities that cannot be granted"), and names it.
    pub(crate) fn take_out_unheld(&mut self) -> Result<Vec<String>, CapabilityError> {
        let held = get()?.permitted;
        let asked = self.effective | self.permitted | self.inheritable | self.ambient;
        for set in [&mut self.effective, &mut self.permitted, &mut self.inheritable, &mut self.ambient] {
            *set &= held;
        }
        Ok((asked - held).iter().map(name).collect())
    }

    /// Fails if the sets ask for what this process could not give.
    pub(crate) fn check_held(&self) -> Result<(), CapabilityError> {
        let held = get()?.permitted;
        let asked = self.effective | self.permitted | self.inheritable | self.ambient;
        let missing: Vec<_> = (asked - held).iter().map(name).collect();
        if missing.is_empty() { Ok(()) } else { Err(CapabilityError::NotHeld(missing.join(", "))) }
    }

    /// Drops from the bounding set what is not in it. Needs CAP_SETPCAP.
    pub(crate) fn drop_bounding(&self) -> Result<(), CapabilityError> {
        for number in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.bounding.contains(capability) {
                continue;
            }
            match remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // One past the last capability that the kernel knows.
                Err(Errno::INVAL) => break,
                Err(errno) => {
                    return Err(failed(&format!("drop {} from the bounding set", name(capability)))(errno));
                }
            }
        }
        Ok(())
    }

    /// Sets all but the bounding set.
    pub(crate) fn apply(&self) -> Result<(), CapabilityError> {
        let Self { bounding: _, effective, permitted, inheritable, ambient } = *self;
        set_capabilities(None, CapabilitySets { effective, permitted, inheritable })
            .map_err(failed("set the capabilities"))?;
        clear_ambient_capability_set().map_err(failed("clear the ambient capabilities"))?;
        // Only what is permitted and inheritable can be ambient (capabilities(7)). Other runtimes leave out the rest, and
        // their specs list it.
        for capability in (ambient & permitted & inheritable).iter() {
            configure_capability_in_ambient_set(capability, true)
                .map_err(|errno| failed(&format!("make {} ambient", name(capability)))(errno))?;
        }
        Ok(())
    }
}

/// Makes everything permitted effective, which a change of user undoes.
pub(crate) fn raise_permitted() -> Result<(), CapabilityError> {
    let sets = get()?;
    set_capabilities(None, CapabilitySets { effective: sets.permitted, ..sets })
        .map_err(failed("raise the permitted capabilities"))
}

fn get() -> Result<CapabilitySets, CapabilityError> {
    capabilities(None).map_err(failed("read the capabilities"))
}

fn failed(action: &str) -> impl Fn(Errno) -> CapabilityError {
    let action = action.to_owned();
    move |errno| CapabilityError::Set { action: action.clone(), source: errno.into() }
}

fn set(listed: &Option<Capabilities>) -> CapabilitySet {
    let Some(listed) = listed else { return CapabilitySet::empty() };
    let numbers = ALL.iter().enumerate().filter(|(_, capability)| listed.contains(capability));
    CapabilitySet::from_bits_retain(numbers.fold(0, |set, (number, _)| set | 1 << number))
}

/// All names that the runtime spec knows.
pub fn names() -> Vec<String> {
    ALL.iter().map(|capability| format!("CAP_{capability}")).collect()
}

/// `CAP_…` of the lowest capability of a set.
fn name(capability: CapabilitySet) -> String {
    let number = capability.bits().trailing_zeros();
    match ALL.get(number as usize) {
        Some(capability) => format!("CAP_{capability}"),
        None => format!("capability {number}"),
    }
}

/// All that the runtime spec can name, by their numbers (`linux/capability.h`).
#[rustfmt::skip]
const ALL: [Capability; 41] = {
    use Capability::*;
    [
        Chown, DacOverride, DacReadSearch, Fowner, Fsetid, Kill, Setgid, Setuid, Setpcap, LinuxImmutable,
        NetBindService, NetBroadcast, NetAdmin, NetRaw, IpcLock, IpcOwner, SysModule, SysRawio, SysChroot, SysPtrace,
        SysPacct, SysAdmin, SysBoot, SysNice, SysResource, SysTime, SysTtyConfig, Mknod, Lease, AuditWrite,
        AuditControl, Setfcap, MacOverride, MacAdmin, Syslog, WakeAlarm, BlockSuspend, AuditRead, Perfmon, Bpf,
        CheckpointRestore,
    ]
};

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use oci_spec::runtime::LinuxCapabilitiesBuilder;

    use super::*;

    #[test]
    fn every_capability_has_the_kernels_number() {
        for (number, capability) in ALL.iter().enumerate() {
            let known = CapabilitySet::from_name(&capability.to_string());
            assert_eq!(known, Some(CapabilitySet::from_bits_retain(1 << number)), "{capability}");
        }
        assert_eq!(name(CapabilitySet::SYS_ADMIN), "CAP_SYS_ADMIN");
        assert_eq!(name(CapabilitySet::from_bits_retain(1 << 63)), "capability 63");
    }

    #[test]
    fn sets_without_capabilities_are_empty() {
        assert_eq!(Sets::from_spec(None), Sets::EMPTY);
        let empty = LinuxCapabilitiesBuilder::default().bounding(HashSet::new()).build().unwrap();
        assert_eq!(Sets::from_spec(Some(&empty)).bounding, CapabilitySet::empty());
    }

    #[test]
    fn sets_are_taken_from_their_own_fields() {
        let one = |capability| HashSet::from([capability]);
        let listed = LinuxCapabilitiesBuilder::default()
            .bounding(one(Capability::Chown))
            .effective(one(Capability::Kill))
            .permitted(one(Capability::Setuid))
            .inheritable(one(Capability::Mknod))
            .ambient(one(Capability::Lease))
            .build()
            .unwrap();
        let expected = Sets {
            bounding: CapabilitySet::CHOWN,
            effective: CapabilitySet::KILL,
            permitted: CapabilitySet::SETUID,
            inheritable: CapabilitySet::MKNOD,
            ambient: CapabilitySet::LEASE,
        };
        assert_eq!(Sets::from_spec(Some(&listed)), expected);
    }
}
