//! The options of a spec's mount: flags of mount(8), propagation, and what is the file system's own business.

use crate::syscalls::MountAttr;

// `linux/mount.h`.
pub(super) const ATTR_RDONLY: u64 = 0x01;
const ATTR_NOSUID: u64 = 0x02;
const ATTR_NODEV: u64 = 0x04;
const ATTR_NOEXEC: u64 = 0x08;
const ATTR_ATIME_MASK: u64 = 0x70;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// What the options of one mount ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// For bind mounts: whether mounts below the source come along.
    pub(super) bind: Option<Bind>,
    /// Properties of the mount itself.
    pub(super) attr: MountAttr,
    /// Properties of the mount and all below it.
    pub(super) recursive_attr: MountAttr,
    /// `MS_SHARED` and the like; several are applied in turn (`slave` and then `shared`).
    pub(super) propagation: Vec<Propagation>,
    /// For bind mounts: whether an empty source is filled with what is at the destination. This runtime's own.
    pub(super) copy_up: bool,
    /// For a tmpfs: whether it is filled with what is at the destination.
    pub(super) tmp_copy_up: bool,
    /// Whether, and how far, files belong to other users than they say.
    pub(super) idmap: Option<Bind>,
    /// Given to the file system.
    pub(super) data: Vec<Datum>,
}

/// How much of the source a bind mount takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bind {
    Alone,
    WithSubmounts,
}

/// A propagation type (`MS_…`), for one mount or for all below it, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Propagation {
    pub(super) kind: u64,
    pub(super) recursive: bool,
}

/// A parameter of the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Datum {
    pub(super) key: String,
    pub(super) value: Option<String>,
}

/// An option that cannot be honoured; why.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("option {option:?} {reason}")]
pub struct OptionError {
    option: String,
    reason: &'static str,
}

/// Options for a whole file system, which the generic mount code understands as parameters by these names.
const SUPERBLOCK: [&str; 8] =
    ["sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand", "iversion"];

/// Those of them that a bind mount can be given: its file system is not changed.
const AS_IT_IS: [&str; 4] = ["async", "nolazytime", "nomand", "noiversion"];

/// Options that other runtimes give a meaning of their own.
const UNSUPPORTED: [&str; 2] = ["remount", "copy-symlink"];

/// What mount(8) and systemd read in fstab(5), and keep from the kernel; also what begins with `x-`.
const OF_FSTAB: [&str; 5] = ["auto", "noauto", "nouser", "_netdev", "nofail"];

/// The options that have a meaning of their own; others are a file system's. Those with an `r` before an attribute hold for
/// all mounts below, too. Engines look here for `rro`.
pub const KNOWN: &[&str] = &[
    "async",
    "atime",
    "bind",
    "copyup",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

pub(super) fn parse(options: &[String]) -> Result<Options, OptionError> {
    let mut parsed = Options::default();
    for option in options.iter().flat_map(|options| split(options)) {
        let refuse = |reason| Err(OptionError { option: option.to_owned(), reason });
        if let Some((set, clear)) = attribute(option) {
            change(&mut parsed.attr, set, clear);
        } else if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            change(&mut parsed.recursive_attr, set, clear);
        } else if let Some(propagation) = propagation(option) {
            parsed.propagation.push(propagation);
        } else if UNSUPPORTED.contains(&option) {
            return refuse("is not supported yet");
        } else {
            match option {
                "bind" => parsed.bind = parsed.bind.or(Some(Bind::Alone)),
                "rbind" => parsed.bind = Some(Bind::WithSubmounts),
                "copyup" => parsed.copy_up = true,
                "tmpcopyup" => parsed.tmp_copy_up = true,
                "idmap" => parsed.idmap = Some(Bind::Alone),
                "ridmap" => parsed.idmap = Some(Bind::WithSubmounts),
                // What these imply (mount(8)); who may mount is not asked here.
                "user" | "users" => change(&mut parsed.attr, ATTR_NOEXEC | ATTR_NOSUID | ATTR_NODEV, 0),
                "owner" | "group" => change(&mut parsed.attr, ATTR_NOSUID | ATTR_NODEV, 0),
                // What one gets anyway.
                "defaults" | "norelatime" | "nostrictatime" | "silent" | "loud" | "" => {}
                option if OF_FSTAB.contains(&option) || option.starts_with("x-") => {}
                option => {
                    let (key, value) = match option.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (option, None),
                    };
                    parsed.data.push(Datum { key: key.to_owned(), value });
                }
            }
        }
    }
    Ok(parsed)
}

/// The options in one string of several, as mount(2) takes them: with commas between them, but for those in quotes (of
/// security contexts) and, as overlay file systems have it, behind a backslash.
fn split(options: &str) -> impl Iterator<Item = &str> {
    let (mut in_quotes, mut is_escaped) = (false, false);
    options.split(move |letter| {
        let ends = letter == ',' && !in_quotes && !is_escaped;
        in_quotes ^= letter == '"';
        is_escaped = letter == '\\' && !is_escaped;
        ends
    })
}

impl Options {
    /// Only a bind mount has a source that can be filled.
    pub(super) fn check_for_file_system(&self, name: &str) -> Result<(), OptionError> {
        if self.copy_up {
            return Err(OptionError { option: "copyup".into(), reason: "is for bind mounts only" });
        }
        if self.tmp_copy_up && name != "tmpfs" {
            return Err(OptionError { option: "tmpcopyup".into(), reason: "is for tmpfs only" });
        }
        if let Some(datum) = self.data.first().filter(|_| matches!(name, "cgroup" | "cgroup2")) {
            let reason = "means nothing for a mount of the container's own cgroup";
            return Err(OptionError { option: datum.key.clone(), reason });
        }
        Ok(())
    }

    /// Nothing is below a new mount, so what holds for it and all below it holds for it.
    pub(super) fn apply_recursive(&mut self) {
        let recursive = std::mem::take(&mut self.recursive_attr);
        change(&mut self.attr, recursive.set, recursive.clear);
    }

    /// A bind mount has no file system to give parameters to, and shares the flags of a whole file system.
    pub(super) fn check_for_bind(&self) -> Result<(), OptionError> {
        if self.tmp_copy_up {
            return Err(OptionError { option: "tmpcopyup".into(), reason: "is for tmpfs only" });
        }
        let mut data = self.data.iter();
        let Some(datum) = data.find(|datum| !AS_IT_IS.contains(&datum.key.as_str())) else { return Ok(()) };
        let reason = if SUPERBLOCK.contains(&datum.key.as_str()) {
            "concerns a whole file system, and cannot be changed by a bind mount"
        } else {
            "means nothing for a bind mount"
        };
        Err(OptionError { option: datum.key.clone(), reason })
    }

    /// These options without `ro`.
    pub(super) fn writable(&self) -> Self {
        let mut options = self.clone();
        options.attr.set &= !ATTR_RDONLY;
        options
    }

    pub(super) fn is_shared(&self) -> bool {
        self.propagation.iter().any(|propagation| propagation.kind == libc::MS_SHARED)
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.attr.set & ATTR_RDONLY != 0
    }
}

/// A later option overrides an earlier one.
fn change(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.set = attr.set & !clear | set;
    // The kernel wants the access-time field cleared whenever it is set (mount_setattr(2)).
    attr.clear = attr.clear & !set | clear;
    if set & ATTR_ATIME_MASK != 0 {
        attr.clear |= ATTR_ATIME_MASK;
    }
}

/// Attributes to set and to clear.
fn attribute(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (ATTR_RDONLY, 0),
        "rw" => (0, ATTR_RDONLY),
        "nosuid" => (ATTR_NOSUID, 0),
        "suid" => (0, ATTR_NOSUID),
        "nodev" => (ATTR_NODEV, 0),
        "dev" => (0, ATTR_NODEV),
        "noexec" => (ATTR_NOEXEC, 0),
        "exec" => (0, ATTR_NOEXEC),
        "nodiratime" => (ATTR_NODIRATIME, 0),
        "diratime" => (0, ATTR_NODIRATIME),
        "nosymfollow" => (ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, ATTR_NOSYMFOLLOW),
        "noatime" => (ATTR_NOATIME, ATTR_ATIME_MASK),
        "strictatime" => (ATTR_STRICTATIME, ATTR_ATIME_MASK),
        // The kernel's default, whose value is 0.
        "relatime" | "atime" => (0, ATTR_ATIME_MASK),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<Propagation> {
    let of = |name| {
        Some(match name {
            "shared" => libc::MS_SHARED,
            "slave" => libc::MS_SLAVE,
            "private" => libc::MS_PRIVATE,
            "unbindable" => libc::MS_UNBINDABLE,
            _ => return None,
        })
    };
    match of(option) {
        Some(kind) => Some(Propagation { kind, recursive: false }),
        None => option.strip_prefix('r').and_then(of).map(|kind| Propagation { kind, recursive: true }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &str) -> Options {
        parse(&options.split(',').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn options_of_a_tmpfs_are_split_into_attributes_and_data() {
        let options = parsed("nosuid,strictatime,mode=755,size=65536k,noswap");
        assert_eq!(options.attr.set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert_eq!(options.attr.clear, ATTR_ATIME_MASK);
        let datum =
            |key: &str, value: Option<&str>| Datum { key: key.into(), value: value.map(str::to_owned) };
        assert_eq!(
            options.data,
            [datum("mode", Some("755")), datum("size", Some("65536k")), datum("noswap", None)]
        );
        assert_eq!(options.bind, None);
    }

    #[test]
    fn later_option_overrides_the_earlier() {
        let options = parsed("ro,rw,exec,noexec,noatime,relatime");
        assert_eq!(options.attr.set, ATTR_NOEXEC);
        assert_eq!(options.attr.clear, ATTR_RDONLY | ATTR_ATIME_MASK);
        assert!(!options.is_readonly());
        assert_eq!(parsed("rbind,bind").bind, Some(Bind::WithSubmounts));
    }

    #[test]
    fn options_with_r_apply_recursively_and_relatime_is_not_one_of_them() {
        let options = parsed("rbind,rro,rnosuid,relatime,rprivate");
        assert_eq!(options.recursive_attr.set, ATTR_RDONLY | ATTR_NOSUID);
        assert_eq!(options.attr.set, 0);
        assert_eq!(options.propagation, [Propagation { kind: libc::MS_PRIVATE, recursive: true }]);
        assert!(options.data.is_empty());
    }

    #[test]
    fn recursive_options_of_a_new_mount_are_its_own() {
        let mut options = parsed("rw,exec,rro,rnoexec,rnoatime,mode=755");
        options.apply_recursive();
        assert!(options.is_readonly());
        assert_eq!(options.attr.set, ATTR_RDONLY | ATTR_NOEXEC | ATTR_NOATIME);
        assert_eq!(options.recursive_attr, MountAttr::default());
    }

    #[test]
    fn options_that_are_listed_are_understood() {
        for name in KNOWN {
            let parsed = parse(&[(*name).to_owned()]).unwrap();
            assert!(parsed.data.is_empty() || SUPERBLOCK.contains(name), "{name} would be the file system's");
        }
        for name in ["rro", "rnosuid", "rnoexec", "rnoatime", "tmpcopyup", "ridmap"] {
            assert!(KNOWN.contains(&name), "{name}");
        }
    }

    #[test]
    fn one_string_may_have_several_options() {
        let listed = [r#"lowerdir=/a\,b:/c,ro,context="s0:c1,c2",xino=off"#.to_owned(), "noexec".to_owned()];
        let parsed = parse(&listed).unwrap();
        assert_eq!(parsed.attr.set, ATTR_RDONLY | ATTR_NOEXEC);
        let values: Vec<_> = parsed.data.iter().map(|datum| datum.value.as_deref().unwrap()).collect();
        assert_eq!(values, [r"/a\,b:/c", r#""s0:c1,c2""#, "off"]);
    }

    #[test]
    fn options_that_cannot_be_honoured_are_refused_by_name() {
        let refused = |option: &str| parse(&[option.to_owned()]).unwrap_err().to_string();
        assert_eq!(refused("copy-symlink"), "option \"copy-symlink\" is not supported yet");
        let error = parsed("bind,size=1m").check_for_bind().unwrap_err().to_string();
        assert_eq!(error, "option \"size\" means nothing for a bind mount");
        assert!(parsed("bind,sync").check_for_bind().is_err());
        assert!(parsed("bind,async,_netdev,x-systemd.automount").check_for_bind().is_ok());
        assert_eq!(parsed("bind,user,exec").attr.set, ATTR_NOSUID | ATTR_NODEV);
        assert!(parsed("rbind,ro,rslave,copyup").check_for_bind().is_ok());
        assert!(parsed("copyup").check_for_file_system("tmpfs").is_err());
        assert!(parsed("ro,memory").check_for_file_system("cgroup").is_err());
        assert!(parsed("ro,nosuid").check_for_file_system("cgroup2").is_ok());
    }
}
