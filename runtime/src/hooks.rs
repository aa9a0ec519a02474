//! Hooks (config.md#posix-platform-hooks): programs that the spec's author has run at points of a container's life,
//! with the container's state on stdin.

use std::{
    ffi::CString,
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::Hook;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, SeekFrom, memfd_create, seek},
    io::{Errno, read},
    pipe::{PipeFlags, pipe_with},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::{
    process::program,
    syscalls::{self, Cloned},
};

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run at all.
    #[error("cannot {action} for the {kind} hook {path}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// Which list of hooks it is in.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It did not succeed.
    #[error("error running hook #{number} of {kind}: {path} {how}{output}")]
    Failed {
        /// Its place in the list, from 0.
        number: usize,
        /// Which list of hooks it is in.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        how: String,
        /// What it printed, starting with `: `, or nothing.
        output: String,
    },
}

/// How much of a hook's output is kept for an error message.
const MAX_OUTPUT_BYTES: usize = 4096;

/// Runs hooks of the caller's one after the other; the first that fails ends it. One that says nothing of its environment
/// has this process's. `enter` is called in each hook's process before it becomes the hook's program. The caller must be
/// single-threaded.
pub fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &str,
    enter: &dyn Fn() -> Result<(), String>,
) -> Result<(), HookError> {
    run_with(kind, hooks, state, &own_environment(), enter)
}

/// As [`run`], with an environment for hooks that say nothing of theirs.
pub(crate) fn run_with(
    kind: &'static str,
    hooks: &[Hook],
    state: &str,
    default_env: &[CString],
    enter: &dyn Fn() -> Result<(), String>,
) -> Result<(), HookError> {
    hooks
        .iter()
        .enumerate()
        .try_for_each(|(number, hook)| Running::start(kind, hook, state, default_env, enter)?.finish(number))
}

struct Running<'a> {
    kind: &'static str,
    path: &'a Path,
    pidfd: OwnedFd,
    output: OwnedFd,
    deadline: Option<(Instant, i64)>,
}

impl<'a> Running<'a> {
    fn start(
        kind: &'static str,
        hook: &'a Hook,
        state: &str,
        default_env: &[CString],
        enter: &dyn Fn() -> Result<(), String>,
    ) -> Result<Self, HookError> {
        let path = hook.path();
        let failed = |action| move |source| HookError::System { action, kind, path: path.clone(), source };
        let errno = |action| move |errno: Errno| failed(action)(errno.into());
        let nul = |_| failed("pass strings")(io::ErrorKind::InvalidInput.into());
        let program = CString::new(path.as_os_str().as_bytes()).map_err(nul)?;
        let strings = |strings: &Option<Vec<String>>| {
            program::c_strings(strings.iter().flatten())
                .ok_or_else(|| failed("pass strings")(io::ErrorKind::InvalidInput.into()))
        };
        let mut args = strings(hook.args())?;
        let env = match hook.env() {
            Some(_) => strings(hook.env())?,
            None => default_env.to_vec(),
        };
        if args.is_empty() {
            args.push(program.clone());
        }
        let stdin = state_file(state).map_err(failed("pass the state"))?;
        let (output, output_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(errno("make a pipe"))?;
        let deadline = match hook.timeout() {
            None => None,
            Some(seconds) => {
                let invalid = || failed("keep to the timeout")(io::ErrorKind::InvalidInput.into());
                let length =
                    u64::try_from(seconds).ok().filter(|&seconds| seconds > 0).ok_or_else(invalid)?;
                Some((Instant::now() + Duration::from_secs(length.min(u32::MAX.into())), seconds))
            }
        };
        match syscalls::clone3(0, None).map_err(failed("make a process"))? {
            Cloned::Parent { pidfd, .. } => Ok(Self { kind, path, pidfd, output, deadline }),
            Cloned::Child => {
                let become_it = || -> Result<(), String> {
                    let text = |error: &dyn std::error::Error| error.to_string();
                    dup2_stdin(&stdin).map_err(|error| text(&error))?;
                    dup2_stdout(&output_writer).map_err(|error| text(&error))?;
                    dup2_stderr(&output_writer).map_err(|error| text(&error))?;
                    syscalls::reset_signals();
                    syscalls::close_on_exec_from(3).map_err(|error| text(&error))?;
                    enter()?;
                    Err(text(&syscalls::execve(&program, &args, &env)))
                };
                if let Err(message) = become_it() {
                    let _ = rustix::io::write(&output_writer, message.as_bytes());
                }
                syscalls::exit_now(127)
            }
        }
    }

    fn finish(self, number: usize) -> Result<(), HookError> {
        let system = |action| {
            move |errno: Errno| HookError::System {
                action,
                kind: self.kind,
                path: self.path.to_owned(),
                source: errno.into(),
            }
        };
        rustix::io::ioctl_fionbio(&self.output, true).map_err(system("read the output"))?;
        let mut printed = Vec::new();
        let mut is_open = true;
        let mut in_time = true;
        loop {
            let left = self.deadline.map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) && std::mem::replace(&mut in_time, false) {
                let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            }
            let wait = left
                .filter(|_| in_time)
                .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            let mut fds = vec![PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
            if is_open {
                fds.push(PollFd::from_borrowed_fd(self.output.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("wait")(errno)),
            }
            let has_ended = fds.first().is_some_and(|fd| !fd.revents().is_empty());
            // Whatever it left running may hold the pipe open for ever.
            is_open = is_open && drain(&self.output, &mut printed);
            if has_ended {
                break;
            }
        }
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        let status = status.map_err(system("wait"))?;
        let how = match status.as_ref().map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((Some(0), _)) => return Ok(()),
            _ if !in_time => {
                format!("did not end within {} s", self.deadline.map_or(0, |(_, seconds)| seconds))
            }
            Some((Some(code), _)) => format!("failed: exit status {code}"),
            Some((None, Some(libc::SIGSYS))) => {
                "was killed: bad system call (SIGSYS); see linux.seccomp".into()
            }
            Some((None, Some(signo))) => format!("was killed by signal {signo}"),
            _ => "ended".into(),
        };
        let printed = String::from_utf8_lossy(&printed);
        let output = match printed.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        };
        Err(HookError::Failed { number, kind: self.kind, path: self.path.to_owned(), how, output })
    }
}

fn own_environment() -> Vec<CString> {
    std::env::vars_os()
        .filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
        .collect()
}

/// A file of the state in memory: unlike a pipe it needs nobody who feeds it.
fn state_file(state: &str) -> io::Result<OwnedFd> {
    let file = memfd_create("state", MemfdFlags::CLOEXEC)?;
    std::fs::File::from(file.try_clone()?).write_all(state.as_bytes())?;
    seek(&file, SeekFrom::Start(0))?;
    Ok(file)
}

/// Reads what is there, but not more than a pipe holds: whoever prints without end must not keep us from looking at the
/// time. `false` at the end. What exceeds the limit is dropped.
fn drain(output: &OwnedFd, printed: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 4096];
    for _ in 0..16 {
        match read(output, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                let room = MAX_OUTPUT_BYTES.saturating_sub(printed.len());
                printed.extend(buffer.iter().take(count.min(room)));
            }
            Err(Errno::INTR) => {}
            Err(errno) => return errno == Errno::AGAIN,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::HookBuilder;

    use super::*;

    fn shell(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = HookBuilder::default().path("/bin/sh").args(["sh", "-c", script].map(String::from));
        if let Some(timeout) = timeout {
            hook = hook.timeout(timeout);
        }
        hook.build().unwrap()
    }

    fn outcome(hook: Hook) -> Result<(), String> {
        run("poststop", &[hook], "{\"id\":\"x\"}", &|| Ok(())).map_err(|error| error.to_string())
    }

    #[test]
    fn hook_gets_the_state_on_stdin() {
        assert_eq!(outcome(shell("read x; [ \"$x\" = '{\"id\":\"x\"}' ]", None)), Ok(()));
    }

    #[test]
    fn hook_that_fails_is_named_with_its_output() {
        let error = outcome(shell("echo no luck >&2; exit 3", None)).unwrap_err();
        assert_eq!(error, "error running hook #0 of poststop: /bin/sh failed: exit status 3: no luck");
    }

    #[test]
    fn hook_that_takes_too_long_is_killed() {
        let error = outcome(shell("sleep 60", Some(1))).unwrap_err();
        assert_eq!(error, "error running hook #0 of poststop: /bin/sh did not end within 1 s");
        assert!(outcome(shell("true", Some(0))).is_err());
    }

    #[test]
    fn hook_that_prints_without_end_is_killed_in_time() {
        let error =
            outcome(shell("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done", Some(1))).unwrap_err();
        assert!(error.contains("did not end within 1 s"), "{error}");
    }

    #[test]
    fn hook_that_leaves_a_process_with_its_output_is_not_waited_for_beyond_its_end() {
        let started = Instant::now();
        assert_eq!(outcome(shell("sleep 20 & exit 0", None)), Ok(()));
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
