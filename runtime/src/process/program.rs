//! The program that the process becomes: found as a shell finds it, in the container, by the container's user.

use std::{
    ffi::{CString, OsStr},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, AtFlags, CWD, FileType, accessat, stat},
    io::Errno,
};

use crate::syscalls;

/// Where commands are looked up if the environment does not say; also Docker's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the command could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No directory of the search path has it.
    #[error("cannot run {command:?}: executable file not found in $PATH ({path})")]
    NotInPath {
        /// As given.
        command: String,
        /// The search path.
        path: String,
    },
    /// There is no such file.
    #[error("cannot run {0:?}: no such file or directory")]
    NotFound(String),
    /// The program is there, but what should run it is not.
    #[error(
        "cannot run {0:?}: its interpreter, or the dynamic linker that it names, was not found: no such file or directory"
    )]
    NoInterpreter(String),
    /// It is there, but cannot be run.
    #[error("cannot run {command:?}: {reason}")]
    NotExecutable {
        /// As given.
        command: String,
        /// Why.
        reason: String,
    },
}

impl ProgramError {
    /// As a shell has it (POSIX.1 §2.8.2): 127 not found, 126 found but not executable.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NotInPath { .. } | Self::NotFound(_) | Self::NoInterpreter(_) => 127,
            Self::NotExecutable { .. } => 126,
        }
    }
}

/// Device and inode of this program's own file, which a container must not be able to run: `/proc/self/exe` as a
/// command would give it a handle on a file of the caller's (CVE-2019-5736).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnProgram {
    device: u64,
    inode: u64,
}

impl OwnProgram {
    /// To be called while the caller's `/proc` is still there.
    pub(crate) fn identify() -> io::Result<Self> {
        let stat = stat("/proc/self/exe")?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// The file that `command` means.
pub(crate) fn find(command: &str, env: &[String], own: OwnProgram) -> Result<PathBuf, ProgramError> {
    let not_executable = |reason: Errno| ProgramError::NotExecutable {
        command: command.to_owned(),
        reason: reason_text(reason),
    };
    if command.contains('/') {
        let path = PathBuf::from(command);
        return match check(&path, own) {
            Ok(()) => Ok(path),
            Err(Errno::NOENT) => Err(ProgramError::NotFound(command.to_owned())),
            Err(errno) => Err(not_executable(errno)),
        };
    }
    let search = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut refused = None;
    for directory in search.split(':').filter(|_| !command.is_empty()) {
        // POSIX.1 §8.3: an empty name is the working directory.
        let path = Path::new(if directory.is_empty() { "." } else { directory }).join(command);
        match check(&path, own) {
            Ok(()) => return Ok(path),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => refused = refused.or(Some(errno)),
        }
    }
    Err(match refused {
        Some(errno) => not_executable(errno),
        None => ProgramError::NotInPath { command: command.to_owned(), path: search.to_owned() },
    })
}

fn check(path: &Path, own: OwnProgram) -> Result<(), Errno> {
    let stat = stat(path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ => return Err(Errno::ACCESS),
    }
    if own == (OwnProgram { device: stat.st_dev, inode: stat.st_ino }) {
        return Err(Errno::ACCESS);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// Becomes the program. Returns only if that fails.
pub(crate) fn execute(path: &Path, command: &str, args: &[CString], env: &[CString]) -> ProgramError {
    let error = match CString::new(path.as_os_str().as_bytes()) {
        Ok(path) => syscalls::execve(&path, args, env),
        Err(error) => error.into(),
    };
    match Errno::from_io_error(&error) {
        // It was there a moment ago.
        Some(Errno::NOENT) => ProgramError::NoInterpreter(command.to_owned()),
        Some(errno) => {
            ProgramError::NotExecutable { command: command.to_owned(), reason: reason_text(errno) }
        }
        None => ProgramError::NotExecutable { command: command.to_owned(), reason: error.to_string() },
    }
}

fn reason_text(errno: Errno) -> String {
    match errno {
        Errno::ACCESS => "permission denied".into(),
        // Engines tell by these words which exit code to have.
        Errno::ISDIR => "is a directory: permission denied".into(),
        Errno::NOTDIR => "a part of its path is not a directory".into(),
        Errno::NOEXEC => "not a program that this kernel can run (exec format error)".into(),
        Errno::LOOP => "too many symbolic links".into(),
        errno => io::Error::from(errno).to_string(),
    }
}

/// Strings for `execve`; `None` if one contains a NUL byte.
pub(crate) fn c_strings<S: AsRef<OsStr>>(strings: impl IntoIterator<Item = S>) -> Option<Vec<CString>> {
    strings.into_iter().map(|string| CString::new(string.as_ref().as_bytes()).ok()).collect()
}
