//! The device rules of `linux.resources.devices`, brought into a form that both cgroup versions can enforce: a
//! default, and exceptions from it.
//!
//! In the spec a later rule overrides earlier ones. cgroup v1 knows no order, and its exceptions cannot have holes,
//! so a rule that would cut one into an earlier, wider rule is refused rather than bent.

use std::fmt;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// Why device rules cannot be enforced.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceRuleError {
    /// The rule is not well-formed.
    #[error("the device rule `{rule}` of linux.resources.devices is not usable: {reason}")]
    Malformed {
        /// The rule, as `allow|deny type major:minor access`.
        rule: String,
        /// Why.
        reason: &'static str,
    },
    /// The rule makes a hole in an earlier, wider one.
    #[error(
        "the device rule `{rule}` of linux.resources.devices takes back a part of `{wider}`; list the parts instead"
    )]
    Hole {
        /// The later rule.
        rule: String,
        /// The earlier rule.
        wider: String,
    },
}

/// Kind of device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Block,
    Char,
}

/// Kinds of access (`BPF_DEVCG_ACC_…` of `linux/bpf.h`).
pub(super) const MKNOD: u32 = 1;
pub(super) const READ: u32 = 2;
pub(super) const WRITE: u32 = 4;

/// A set of devices and what may be done with them. `None` matches any number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) kind: Kind,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    /// Bits of [`MKNOD`], [`READ`] and [`WRITE`].
    pub(super) access: u32,
}

impl Exception {
    /// Whether every device of `other` is one of these.
    fn covers(&self, other: &Self) -> bool {
        let covers = |mine: Option<u32>, theirs| mine.is_none() || mine == theirs;
        self.kind == other.kind && covers(self.major, other.major) && covers(self.minor, other.minor)
    }

    /// Whether some device could be both.
    fn overlaps(&self, other: &Self) -> bool {
        let overlaps = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        self.kind == other.kind && overlaps(self.major, other.major) && overlaps(self.minor, other.minor)
    }
}

/// As the devices controller of cgroup v1 reads it.
impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u32>| number.map_or("*".to_owned(), |number| number.to_string());
        let kind = match self.kind {
            Kind::Block => 'b',
            Kind::Char => 'c',
        };
        write!(f, "{kind} {}:{} ", number(self.major), number(self.minor))?;
        for (bit, letter) in [(READ, "r"), (WRITE, "w"), (MKNOD, "m")] {
            if self.access & bit != 0 {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

/// Which devices a container may use.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DevicePolicy {
    pub(super) allow_by_default: bool,
    pub(super) exceptions: Vec<Exception>,
}

/// Access that every restricted container keeps: making nodes, which gives no access by itself, and the devices
/// that config-linux.md#default-devices has every container supplied with, and pseudo-terminals.
const ALWAYS_ALLOWED: [(Kind, Option<u32>, Option<u32>, u32); 10] = [
    (Kind::Block, None, None, MKNOD),
    (Kind::Char, None, None, MKNOD),
    (Kind::Char, Some(1), Some(3), READ | WRITE | MKNOD), // null
    (Kind::Char, Some(1), Some(5), READ | WRITE | MKNOD), // zero
    (Kind::Char, Some(1), Some(7), READ | WRITE | MKNOD), // full
    (Kind::Char, Some(1), Some(8), READ | WRITE | MKNOD), // random
    (Kind::Char, Some(1), Some(9), READ | WRITE | MKNOD), // urandom
    (Kind::Char, Some(5), Some(0), READ | WRITE | MKNOD), // tty
    (Kind::Char, Some(5), Some(2), READ | WRITE | MKNOD), // ptmx
    (Kind::Char, Some(136), None, READ | WRITE | MKNOD),  // pts/*
];

/// The policy that the rules ask for; `None` if it restricts nothing.
pub(super) fn policy(rules: &[LinuxDeviceCgroup]) -> Result<Option<DevicePolicy>, DeviceRuleError> {
    if rules.is_empty() {
        return Ok(None);
    }
    let mut policy = DevicePolicy { allow_by_default: true, exceptions: Vec::new() };
    for rule in rules {
        for devices in devices(rule)? {
            match devices {
                Devices::All => {
                    policy = DevicePolicy { allow_by_default: rule.allow(), exceptions: Vec::new() }
                }
                Devices::Some(devices) => policy.add(rule, devices)?,
            }
        }
    }
    for (kind, major, minor, access) in ALWAYS_ALLOWED {
        if !policy.allow_by_default {
            policy.except(Exception { kind, major, minor, access });
        }
    }
    Ok((!policy.allow_by_default || !policy.exceptions.is_empty()).then_some(policy))
}

enum Devices {
    All,
    Some(Exception),
}

/// What one rule speaks of.
fn devices(rule: &LinuxDeviceCgroup) -> Result<Vec<Devices>, DeviceRuleError> {
    let malformed = |reason| DeviceRuleError::Malformed { rule: describe(rule), reason };
    // config-linux.md#allowed-device-list: an unset number or access means all of them; runc reads -1 so, too.
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => {
            u32::try_from(number).map(Some).map_err(|_| malformed("a device number is out of range"))
        }
    };
    let (major, minor) = (number(rule.major())?, number(rule.minor())?);
    let access = match rule.access().as_deref() {
        None | Some("") => READ | WRITE | MKNOD,
        Some(letters) => letters.chars().try_fold(0, |access, letter| match letter {
            'r' => Ok(access | READ),
            'w' => Ok(access | WRITE),
            'm' => Ok(access | MKNOD),
            // Of a device's kind it means any, and some write it here, too, where other runtimes pass over it. What is
            // meant is not known, so it takes everything away, and gives nothing.
            'a' if rule.allow() => Ok(access),
            'a' => Ok(READ | WRITE | MKNOD),
            _ => Err(malformed("the access is not made of r, w and m")),
        })?,
    };
    let of_kind = |kind| Devices::Some(Exception { kind, major, minor, access });
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A if major.is_none() && minor.is_none() && access == READ | WRITE | MKNOD => {
            Ok(vec![Devices::All])
        }
        LinuxDeviceType::A => Ok(vec![of_kind(Kind::Block), of_kind(Kind::Char)]),
        LinuxDeviceType::B => Ok(vec![of_kind(Kind::Block)]),
        LinuxDeviceType::C | LinuxDeviceType::U => Ok(vec![of_kind(Kind::Char)]),
        LinuxDeviceType::P => Err(malformed("a FIFO is not a device")),
    }
}

fn describe(rule: &LinuxDeviceCgroup) -> String {
    let number = |number: Option<i64>| number.map_or("*".to_owned(), |number| number.to_string());
    let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
    format!(
        "{} {} {}:{} {}",
        if rule.allow() { "allow" } else { "deny" },
        kind.as_str(),
        number(rule.major()),
        number(rule.minor()),
        rule.access().as_deref().unwrap_or("rwm"),
    )
}

impl DevicePolicy {
    fn add(&mut self, rule: &LinuxDeviceCgroup, devices: Exception) -> Result<(), DeviceRuleError> {
        if rule.allow() != self.allow_by_default {
            self.except(devices);
            return Ok(());
        }
        // Back to the default: exceptions lose what the rule takes back.
        for exception in &mut self.exceptions {
            if devices.covers(exception) {
                exception.access &= !devices.access;
            } else if devices.overlaps(exception) && devices.access & exception.access != 0 {
                return Err(DeviceRuleError::Hole { rule: describe(rule), wider: exception.to_string() });
            }
        }
        self.exceptions.retain(|exception| exception.access != 0);
        Ok(())
    }

    fn except(&mut self, devices: Exception) {
        let same = |exception: &&mut Exception| exception.covers(&devices) && devices.covers(exception);
        match self.exceptions.iter_mut().find(same) {
            Some(exception) => exception.access |= devices.access,
            None => self.exceptions.push(devices),
        }
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::*;

    fn rule(allow: bool, kind: LinuxDeviceType, numbers: (i64, i64), access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .major(numbers.0)
            .minor(numbers.1)
            .access(access)
            .build()
            .unwrap()
    }

    fn deny_all() -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build().unwrap()
    }

    fn lines(rules: &[LinuxDeviceCgroup]) -> Vec<String> {
        let policy = policy(rules).unwrap().unwrap();
        policy.exceptions.iter().map(Exception::to_string).collect()
    }

    #[test]
    fn policy_without_restriction_is_none() {
        assert_eq!(policy(&[]), Ok(None));
        let allow_all = LinuxDeviceCgroupBuilder::default().allow(true).build().unwrap();
        assert_eq!(policy(&[deny_all(), allow_all]), Ok(None));
    }

    #[test]
    fn policy_of_deny_all_keeps_the_default_devices() {
        let policy = policy(&[deny_all()]).unwrap().unwrap();
        assert!(!policy.allow_by_default);
        assert_eq!(policy.exceptions.len(), ALWAYS_ALLOWED.len());
    }

    #[test]
    fn later_rule_overrides_an_earlier_one_that_it_covers() {
        let fuse = rule(true, LinuxDeviceType::C, (10, 229), "rwm");
        assert!(lines(&[deny_all(), fuse.clone()]).contains(&"c 10:229 rwm".to_owned()));
        let no_write = rule(false, LinuxDeviceType::C, (10, -1), "w");
        assert!(lines(&[deny_all(), fuse, no_write]).contains(&"c 10:229 rm".to_owned()));
    }

    #[test]
    fn hole_in_a_wider_rule_is_refused() {
        let wide = rule(true, LinuxDeviceType::B, (8, -1), "rw");
        let hole = rule(false, LinuxDeviceType::B, (8, 1), "w");
        let error = policy(&[deny_all(), wide, hole]).unwrap_err();
        assert_eq!(error, DeviceRuleError::Hole { rule: "deny b 8:1 w".into(), wider: "b 8:* rw".into() });
    }

    #[test]
    fn malformed_rules_are_refused() {
        for bad in [
            rule(true, LinuxDeviceType::C, (-2, 0), "r"),
            rule(true, LinuxDeviceType::C, (1, 1 << 40), "r"),
            rule(true, LinuxDeviceType::C, (1, 1), "x"),
            rule(true, LinuxDeviceType::P, (1, 1), "r"),
        ] {
            assert!(matches!(policy(&[bad]), Err(DeviceRuleError::Malformed { .. })));
        }
    }
}
