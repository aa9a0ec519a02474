//! What a request mounts into a sandbox: parsing of Docker's `-v`, `--mount` and `--tmpfs`, and the entries of the
//! runtime spec that they become. Nothing here touches the host's files; [`crate::sources`] does.

use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use crate::request::Bytes;

/// Most mounts that one sandbox can have: a guest's share names them by number, and its command line has no limit to
/// warn of a mistake.
pub const MAX_MOUNTS: usize = 64;

/// One mount, as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRequest {
    /// Where it appears: absolute, without `.` and `..`.
    pub target: String,
    /// Whether the sandbox is kept from writing to it.
    pub read_only: bool,
    /// What appears there.
    pub source: MountSource,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSource {
    /// A file or directory of the host.
    Bind {
        /// Its path on the host; absolute.
        path: PathBuf,
        /// Whether a missing one is made, as a directory: `-v` does, `--mount` does not.
        create: bool,
    },
    /// A volume that outlives the sandbox.
    Volume {
        /// Its name.
        name: String,
        /// Whether an empty one is filled with what the image has at the target.
        copy: bool,
    },
    /// A file system in memory that ends with the sandbox.
    Tmpfs {
        /// Options of the spec's mount.
        options: Vec<String>,
    },
}

/// A mount that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{given}` is no mount: {reason}")]
pub struct MountSyntaxError {
    given: String,
    reason: String,
}

impl MountRequest {
    /// Docker's `-v`: `/HOST/PATH:TARGET[:ro]` or `VOLUME:TARGET[:ro][,nocopy]`.
    pub fn parse_volume(text: &str) -> Result<Self, MountSyntaxError> {
        let bad = |reason: &str| MountSyntaxError { given: text.into(), reason: reason.into() };
        let mut parts = text.split(':');
        let (Some(source), Some(target), options, None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad("write SOURCE:TARGET, with :ro after it to forbid writing"));
        };
        let (mut read_only, mut copy) = (false, true);
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            match option {
                "ro" | "readonly" => read_only = true,
                "rw" => read_only = false,
                "nocopy" => copy = false,
                other => {
                    return Err(bad(&format!(
                        "the option `{other}` is not supported; there are ro, rw and nocopy"
                    )));
                }
            }
        }
        let source = if source.starts_with('/') {
            if !copy {
                return Err(bad("nocopy is for volumes, and this is a path of the host"));
            }
            MountSource::Bind { path: source.into(), create: true }
        } else if source.starts_with('.') || source.starts_with('~') {
            return Err(bad(
                "the source is neither an absolute path nor the name of a volume; write \"$PWD/…\"",
            ));
        } else {
            MountSource::Volume { name: volume_name(source).map_err(|reason| bad(&reason))?, copy }
        };
        Ok(Self { target: mount_target(target).map_err(|reason| bad(&reason))?, read_only, source })
    }

    /// Docker's `--mount`: `type=bind|volume|tmpfs,source=…,target=…[,readonly]…`.
    pub fn parse_mount(text: &str) -> Result<Self, MountSyntaxError> {
        let bad = |reason: String| MountSyntaxError { given: text.into(), reason };
        let mut fields = Fields::default();
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').map_or((pair, None), |(key, value)| (key, Some(value)));
            fields.set(key, value).map_err(bad)?;
        }
        fields.finish().map_err(bad)
    }

    /// Docker's `--tmpfs`: `TARGET[:OPTION,…]`.
    pub fn parse_tmpfs(text: &str) -> Result<Self, MountSyntaxError> {
        let bad = |reason: String| MountSyntaxError { given: text.into(), reason };
        let (target, given) = text.split_once(':').unwrap_or((text, ""));
        let mut options: Vec<String> = TMPFS_DEFAULTS.map(String::from).to_vec();
        let mut read_only = false;
        for option in given.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                None if option == "ro" || option == "rw" => read_only = option == "ro",
                None if TMPFS_FLAGS.contains(&option) => options.push(option.into()),
                Some(("size", size)) => options.push(size_option(size).map_err(bad)?),
                Some(("mode", mode)) => options.push(mode_option(mode).map_err(bad)?),
                Some((key @ ("uid" | "gid" | "nr_inodes"), number)) if number.parse::<u32>().is_ok() => {
                    options.push(format!("{key}={number}"));
                }
                _ => {
                    let known = TMPFS_FLAGS.join(", ");
                    return Err(bad(format!(
                        "the option `{option}` is not supported; there are ro, rw, size=, mode=, uid=, gid=, \
                         nr_inodes=, {known}"
                    )));
                }
            }
        }
        let target = mount_target(target).map_err(bad)?;
        Ok(Self { target, read_only, source: MountSource::Tmpfs { options } })
    }

    /// The spec's mount. `origin` is what a bind or a volume is called where the mount is made: a path of the host, or
    /// one in the guest; `more` are options that it needs besides those asked for.
    pub(crate) fn to_spec(&self, origin: &Path, more: &[&str]) -> Value {
        if let MountSource::Tmpfs { options } = &self.source {
            let read_only = self.read_only.then(|| "ro".to_owned());
            let options: Vec<String> = options.iter().cloned().chain(read_only).collect();
            return json!({"destination": self.target, "type": "tmpfs", "source": "tmpfs", "options": options});
        }
        // With the mounts below it, as Docker does, and then those read-only as well.
        let mut options = vec!["rbind", "rprivate"];
        options.extend(more);
        if self.read_only {
            options.extend(["ro", "rro"]);
        }
        json!({"destination": self.target, "type": "bind", "source": origin, "options": options})
    }

    /// Whether it is a file system in memory, which needs nothing of the host.
    pub fn is_tmpfs(&self) -> bool {
        matches!(self.source, MountSource::Tmpfs { .. })
    }
}

/// As Docker; the kernel's own default for the mode is 1777.
const TMPFS_DEFAULTS: [&str; 3] = ["noexec", "nosuid", "nodev"];
const TMPFS_FLAGS: [&str; 8] = ["exec", "noexec", "suid", "nosuid", "dev", "nodev", "noatime", "nodiratime"];

/// The fields of one `--mount`.
#[derive(Default)]
struct Fields {
    kind: Option<String>,
    source: Option<String>,
    target: Option<String>,
    read_only: bool,
    no_copy: bool,
    tmpfs: Vec<String>,
}

impl Fields {
    fn set(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        let needed = || value.map(str::to_owned).ok_or_else(|| format!("{key} needs a value"));
        match key {
            "type" => self.kind = Some(needed()?),
            "source" | "src" => self.source = Some(needed()?),
            "target" | "destination" | "dst" => self.target = Some(needed()?),
            "readonly" | "ro" => self.read_only = truth(key, value)?,
            "volume-nocopy" => self.no_copy = truth(key, value)?,
            "tmpfs-size" => self.tmpfs.push(size_option(&needed()?)?),
            "tmpfs-mode" => self.tmpfs.push(mode_option(&needed()?)?),
            _ => {
                return Err(format!(
                    "the field `{key}` is not supported; there are type, source, target, readonly, volume-nocopy, \
                     tmpfs-size and tmpfs-mode"
                ));
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<MountRequest, String> {
        let target = mount_target(&self.target.ok_or("it has no target=")?)?;
        let kind = self.kind.as_deref().unwrap_or("volume");
        if self.no_copy && kind != "volume" {
            return Err(format!("volume-nocopy means nothing for type={kind}"));
        }
        if !self.tmpfs.is_empty() && kind != "tmpfs" {
            return Err(format!("tmpfs-size and tmpfs-mode mean nothing for type={kind}"));
        }
        let source = match (kind, self.source) {
            ("bind", Some(path)) if path.starts_with('/') => {
                MountSource::Bind { path: path.into(), create: false }
            }
            ("bind", Some(path)) => return Err(format!("the source `{path}` is not an absolute path")),
            ("bind", None) => return Err("type=bind needs a source=".into()),
            ("volume", Some(name)) => MountSource::Volume { name: volume_name(&name)?, copy: !self.no_copy },
            ("volume", None) => return Err("type=volume needs a source=, the volume's name".into()),
            ("tmpfs", None) => MountSource::Tmpfs {
                options: TMPFS_DEFAULTS.map(String::from).into_iter().chain(self.tmpfs).collect(),
            },
            ("tmpfs", Some(_)) => return Err("type=tmpfs has no source".into()),
            (other, _) => {
                return Err(format!("type={other} is not supported; there are bind, volume and tmpfs"));
            }
        };
        Ok(MountRequest { target, read_only: self.read_only, source })
    }
}

fn truth(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(format!("{key}={other} is neither true nor false")),
    }
}

fn size_option(size: &str) -> Result<String, String> {
    size.parse().map(|Bytes(bytes)| format!("size={bytes}"))
}

fn mode_option(mode: &str) -> Result<String, String> {
    match u32::from_str_radix(mode, 8) {
        Ok(bits) if bits <= 0o7777 => Ok(format!("mode={bits:o}")),
        _ => Err(format!("the mode `{mode}` is not octal, such as 1777")),
    }
}

/// The rule of Docker for volume names, which are directory names here.
pub fn volume_name(name: &str) -> Result<String, String> {
    let mut bytes = name.bytes();
    let good = (2..=255).contains(&name.len())
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if good {
        return Ok(name.into());
    }
    Err(format!(
        "`{name}` cannot name a volume; use 2 to 255 letters, digits, `_`, `.` and `-`, starting with a letter or \
         digit (a path of the host starts with `/`)"
    ))
}

/// A target as the kernel will see it: absolute, and without detours, since two spellings of one place are a mistake.
fn mount_target(target: &str) -> Result<String, String> {
    if target.contains('\0') {
        return Err("the target contains a NUL byte".into());
    }
    if !target.starts_with('/') {
        return Err(format!("the target `{target}` is not absolute; start it with `/`"));
    }
    let mut clean = String::new();
    for component in Path::new(target).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                clean.push('/');
                clean.push_str(&name.to_string_lossy());
            }
            Component::ParentDir | Component::Prefix(_) => {
                return Err(format!("the target `{target}` contains `..`; write the path that you mean"));
            }
        }
    }
    if clean.is_empty() {
        return Err("the target cannot be `/`, which is the image's".into());
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(path: &str, create: bool) -> MountSource {
        MountSource::Bind { path: path.into(), create }
    }

    #[test]
    fn volume_option_is_a_path_or_a_name() {
        let parsed = MountRequest::parse_volume("/a b/c:/data//x/.:ro").unwrap();
        assert_eq!(parsed.target, "/data/x");
        assert!(parsed.read_only);
        assert_eq!(parsed.source, bind("/a b/c", true));
        let parsed = MountRequest::parse_volume("web.data:/data:rw,nocopy").unwrap();
        assert_eq!(parsed.source, MountSource::Volume { name: "web.data".into(), copy: false });
        assert!(!parsed.read_only);
    }

    #[test]
    fn volume_option_of_nonsense_is_refused() {
        for text in [
            "",
            "/a",
            "/a:",
            ":/a",
            "/a:b",
            "/a:/",
            "/a:/b:ro:x",
            "/a:/b:z",
            "./a:/b",
            "/a:/b/../c",
            "-x:/b",
            "a/b:/c",
            "/a:/b:nocopy",
            "/a:/b:",
            "x:/b",
        ] {
            assert!(MountRequest::parse_volume(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mount_option_of_each_type_is_understood() {
        let parsed = MountRequest::parse_mount("type=bind,src=/a,dst=/b,readonly").unwrap();
        assert_eq!((parsed.source, parsed.read_only), (bind("/a", false), true));
        let parsed = MountRequest::parse_mount("source=vol,target=/b,volume-nocopy").unwrap();
        assert_eq!(parsed.source, MountSource::Volume { name: "vol".into(), copy: false });
        let parsed = MountRequest::parse_mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=0700").unwrap();
        let MountSource::Tmpfs { options } = parsed.source else { panic!("{parsed:?}") };
        assert_eq!(options, ["noexec", "nosuid", "nodev", "size=1048576", "mode=700"]);
    }

    #[test]
    fn mount_option_of_nonsense_is_refused_by_the_field() {
        for (text, word) in [
            ("type=bind,target=/b", "source"),
            ("type=bind,source=a,target=/b", "absolute"),
            ("type=npipe,source=/a,target=/b", "npipe"),
            ("type=bind,source=/a,target=/b,bind-propagation=shared", "bind-propagation"),
            ("type=tmpfs,source=/a,target=/b", "no source"),
            ("type=bind,source=/a,target=/b,tmpfs-size=1m", "tmpfs-size"),
            ("type=bind,source=/a,target=/b,readonly=maybe", "maybe"),
            ("type=bind,source=/a", "target"),
            ("target", "needs a value"),
            ("type=tmpfs,target=/t,tmpfs-mode=9", "octal"),
        ] {
            let error = MountRequest::parse_mount(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn tmpfs_option_has_docker_s_defaults_and_refuses_unknown_ones() {
        let parsed = MountRequest::parse_tmpfs("/run:size=64k,exec,ro").unwrap();
        let spec = parsed.to_spec(Path::new(""), &[]);
        let options = json!(["noexec", "nosuid", "nodev", "size=65536", "exec", "ro"]);
        assert_eq!(spec["options"], options);
        for text in ["run", "/run:size=x", "/run:bind", "/run:mode=rwx", "/run:huge=always"] {
            assert!(MountRequest::parse_tmpfs(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bind_becomes_a_recursive_private_mount() {
        let parsed = MountRequest::parse_volume("/a:/b:ro").unwrap();
        let spec = parsed.to_spec(Path::new("/elsewhere"), &["nosuid"]);
        assert_eq!(spec["source"], "/elsewhere");
        assert_eq!(spec["options"], json!(["rbind", "rprivate", "nosuid", "ro", "rro"]));
    }
}
