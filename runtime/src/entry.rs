//! The steps on the way to a program that every process of a container goes through, whether it is the first one or
//! joins later: what it sheds at the beginning, and what it takes on at the end.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, hash_map},
    convert::Infallible,
    ffi::{CStr, CString},
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Process;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
    io::{Errno, fcntl_dupfd_cloexec, retry_on_intr},
    net::{SocketFlags, accept_with},
    process::{
        DumpableBehavior, Signal, chdir, getcwd, set_dumpable_behavior, set_parent_process_death_signal,
        setsid, umask,
    },
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    thread::set_no_new_privs,
};

use crate::{
    hooks,
    init::InitError,
    launch::Stdio,
    process::{
        accounts::{self, Account, AccountError},
        capabilities,
        labels::Label,
        program::{self, OwnProgram},
        rlimits, scheduling, user,
    },
    procfs,
    seccomp::Filter,
    syscalls,
};

/// A process on its way to its program.
pub(crate) struct Entry<'a> {
    pub(crate) process: &'a Process,
    /// Docker's `user[:group]`, in place of the spec's numbers.
    pub(crate) user: Option<&'a str>,
    pub(crate) stdio: &'a Stdio,
    pub(crate) capabilities: &'a capabilities::Sets,
    pub(crate) filter: Option<&'a Filter>,
    pub(crate) args: &'a [CString],
    pub(crate) env: &'a [CString],
    /// Name of its session keyring; `None` keeps the caller's.
    pub(crate) keyring: Option<&'a CStr>,
    pub(crate) own_program: OwnProgram,
    pub(crate) kill_on_parent_death: bool,
    /// Descriptors from 3 up that stay open.
    pub(crate) preserved_fds: &'a [i32],
    /// Whether the additional groups stay those of the caller.
    pub(crate) keep_groups: bool,
    /// Gets [`READY`] before the last steps, then nothing if they succeed.
    pub(crate) verdict: BorrowedFd<'a>,
    /// Yields this process's id, as the parent sees it, once the parent lets it go on; then a byte if it hands over a
    /// listener and there is no gate.
    pub(crate) released: Option<BorrowedFd<'a>>,
    /// A listening socket at which it waits for the byte that lets it go on.
    pub(crate) gate: Option<BorrowedFd<'a>>,
    /// Who let it through the gate, and hears of what fails then.
    pub(crate) starter: RefCell<Option<OwnedFd>>,
    /// What the kernel is told to give the program.
    pub(crate) label: RefCell<Option<Label>>,
    /// Whether the seccomp policy is in force.
    pub(crate) is_filtered: Cell<bool>,
}

/// Tells the parent that the process has come to its last steps. Without it, the end of the pipe means that the
/// process was killed on its way there.
pub(crate) const READY: u8 = 0xff;

/// Has whoever waits for news take a listener from this process; the number of its descriptor follows, in four bytes.
pub(crate) const LISTENER: u8 = 0xfe;

pub(crate) fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> InitError {
    move |source| InitError::Step { action, source: source.into() }
}

impl Entry<'_> {
    /// Nothing that the parent happens to have, be it signals, keys or a terminal, reaches the container.
    pub(crate) fn detach_from_parent(&self) -> Result<(), InitError> {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("ask to die with the parent"))?;
        self.check_parent()?;
        syscalls::reset_signals();
        setsid().map_err(step("start a session"))?;
        umask(Mode::empty());
        self.place_stdio().map_err(step("place stdin, stdout and stderr"))?;
        let Some(keyring) = self.keyring else { return Ok(()) };
        match syscalls::join_session_keyring(keyring) {
            // Kernels without keyrings, and containers around us that forbid them.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
            result => result.map_err(step("join a session keyring")),
        }
    }

    /// Until execve, nobody in a PID namespace that this process joins may look into it.
    pub(crate) fn become_undumpable(&self) -> Result<(), InitError> {
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("become undumpable"))
    }

    /// The parent may have died before this process asked to be told.
    fn check_parent(&self) -> Result<(), InitError> {
        let mut pipe = [PollFd::from_borrowed_fd(self.verdict, PollFlags::empty())];
        poll(&mut pipe, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(step("poll the parent"))?;
        let [pipe] = &pipe;
        if pipe.revents().contains(PollFlags::ERR) { Err(InitError::Orphaned) } else { Ok(()) }
    }

    fn place_stdio(&self) -> Result<(), Errno> {
        // One of them might be where another one goes.
        let clear = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, 3);
        let Stdio { stdin, stdout, stderr } = self.stdio;
        let (stdin, stdout, stderr) = (clear(stdin)?, clear(stdout)?, clear(stderr)?);
        dup2_stdin(stdin)?;
        dup2_stdout(stdout)?;
        dup2_stderr(stderr)
    }

    /// What only a caller's own `/proc` and rights allow.
    pub(crate) fn use_own_proc(&self) -> Result<(), InitError> {
        self.label.replace(Label::open(self.process)?);
        match self.process.oom_score_adj() {
            Some(value) => {
                set_oom_score("self", value).map_err(|source| InitError::OomScore { value, source })
            }
            None => Ok(()),
        }
    }

    /// The user asked for by name, else by the spec's numbers.
    pub(crate) fn account(&self, root: BorrowedFd<'_>) -> Result<Account, AccountError> {
        let account = match self.user {
            Some(user) => accounts::resolve(root, user)?,
            None => self.process.user().into(),
        };
        account.checked()
    }

    /// The spec's variables, and `HOME`, which programs rely on and other runtimes add, too.
    pub(crate) fn environment(&self, root: BorrowedFd<'_>, account: &Account) -> Vec<CString> {
        let mut env = unique(self.env);
        if !env.iter().any(|variable| variable.as_bytes().starts_with(b"HOME=")) {
            env.extend(CString::new(format!("HOME={}", accounts::home(root, account.uid))));
        }
        env
    }

    /// Limits, user and working directory. All permitted capabilities are still there afterwards.
    pub(crate) fn take_on_identity(&self, account: &Account) -> Result<PathBuf, InitError> {
        for rlimit in self.process.rlimits().iter().flatten() {
            rlimits::set(rlimit)?;
        }
        scheduling::apply(self.process)?;
        self.capabilities.check_held()?;
        self.capabilities.drop_bounding()?;
        // Root may enter directories that the user may not, and the other way round on network file systems.
        let entered = chdir(self.process.cwd());
        user::own_stdio(account)?;
        user::switch(account, self.process.user().umask(), self.keep_groups)?;
        // The switch made it dumpable or not by the machine's settings.
        self.become_undumpable()?;
        if entered.is_err() {
            chdir(self.process.cwd()).map_err(|errno| self.working_directory_failed(errno))?;
        }
        self.check_working_directory()?;
        let env = self.process.env().as_deref().unwrap_or_default();
        Ok(program::find(self.command(), env, self.own_program)?)
    }

    fn working_directory_failed(&self, errno: Errno) -> InitError {
        InitError::WorkingDirectory { path: self.process.cwd().clone(), source: errno.into() }
    }

    /// A working directory such as `/proc/self/fd/7` could be one of the caller's (CVE-2024-21626). The kernel
    /// marks what is outside of the root as unreachable.
    fn check_working_directory(&self) -> Result<(), InitError> {
        match getcwd(Vec::new()) {
            Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
            Ok(_) | Err(Errno::NOENT) => Err(InitError::Outside(self.process.cwd().clone())),
            Err(errno) => Err(self.working_directory_failed(errno)),
        }
    }

    fn command(&self) -> &str {
        self.process.args().iter().flatten().next().map_or("", String::as_str)
    }

    /// Becomes the program; `before` is what has to happen between the gate and that.
    pub(crate) fn execute(
        &self,
        program: &Path,
        env: &[CString],
        before: &dyn Fn() -> Result<(), InitError>,
    ) -> Result<Infallible, InitError> {
        syscalls::close_on_exec_from(3).map_err(step("mark open files close-on-exec"))?;
        for fd in self.preserved_fds {
            syscalls::keep_on_exec(*fd).map_err(step("keep a preserved descriptor"))?;
        }
        // A change of user clears the death signal, so it is set, or given up, only now.
        let death_signal = self.kill_on_parent_death.then_some(Signal::KILL);
        if self.gate.is_none() {
            set_parent_process_death_signal(death_signal).map_err(step("ask to die with the parent"))?;
            self.check_parent()?;
        } else {
            // Whoever created it is expected to leave.
            self.check_parent()?;
            set_parent_process_death_signal(None).map_err(step("outlive the parent"))?;
        }
        rustix::io::write(self.verdict, &[READY]).map_err(step("report to the parent"))?;
        self.pass_gate()?;
        if let Some(label) = self.label.borrow().as_ref() {
            label.set()?;
        }
        before()?;
        self.confine()?;
        Err(program::execute(program, self.command(), self.args, env).into())
    }

    /// Waits for somebody who says go. Others may connect, to see whether it still waits.
    fn pass_gate(&self) -> Result<(), InitError> {
        let Some(gate) = self.gate else { return Ok(()) };
        // Whoever created it must not be kept waiting for the end of what it shares with this process.
        let mut kept = [self.preserved_fds, &[gate.as_raw_fd()]].concat();
        kept.extend(self.label.borrow().as_ref().map(|label| label.file().as_raw_fd()));
        syscalls::close_all_but(&kept).map_err(step("close files"))?;
        loop {
            let starter = match accept_with(gate, SocketFlags::CLOEXEC) {
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                result => result.map_err(step("wait for the start"))?,
            };
            // Whoever only looks closes it again.
            let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
            if retry_on_intr(|| poll(&mut [PollFd::new(&starter, PollFlags::IN)], Some(&patience)))
                .is_ok_and(|ready| ready == 0)
            {
                continue;
            }
            let mut byte = [0];
            if retry_on_intr(|| rustix::io::read(&starter, &mut byte)) == Ok(1) {
                self.starter.replace(Some(starter));
                // From now on nobody gets through any more, which is how others see that it was started.
                let _ = rustix::net::shutdown(gate, rustix::net::Shutdown::Both);
                return Ok(());
            }
        }
    }

    /// Gives up all rights that the program does not get. Without no_new_privs only CAP_SYS_ADMIN may install a
    /// filter, and the filter then has to let capset pass.
    pub(crate) fn confine(&self) -> Result<(), InitError> {
        self.prepare_filter()?;
        if self.process.no_new_privileges() == Some(true) {
            self.capabilities.apply()?;
            self.install_filter()
        } else {
            self.install_filter()?;
            Ok(self.capabilities.apply()?)
        }
    }

    fn prepare_filter(&self) -> Result<(), InitError> {
        if self.process.no_new_privileges() == Some(true) {
            set_no_new_privs(true).map_err(step("set no_new_privs"))
        } else {
            Ok(capabilities::raise_permitted()?)
        }
    }

    fn install_filter(&self) -> Result<(), InitError> {
        let Some(filter) = self.filter.filter(|_| !self.is_filtered.replace(true)) else { return Ok(()) };
        match filter.install()? {
            Some(listener) => self.hand_over(listener).map_err(step("hand over the seccomp listener")),
            None => Ok(()),
        }
    }

    /// Has whoever waits for news fetch the listener, and waits until that is done. Calls that this takes are subject to
    /// the policy by now: `write`, of which it must not notify, and `read`, which may well wait for an answer.
    fn hand_over(&self, listener: OwnedFd) -> io::Result<()> {
        let mut message = vec![LISTENER];
        message.extend(listener.as_raw_fd().to_le_bytes());
        let starter = self.starter.borrow();
        let (to, from) = match &starter.as_ref().map(AsFd::as_fd) {
            Some(starter) => (*starter, *starter),
            None => (self.verdict, self.released.ok_or(io::ErrorKind::NotConnected)?),
        };
        rustix::io::write(to, &message)?;
        let is_taken = retry_on_intr(|| rustix::io::read(from, &mut [0]))? == 1;
        // `execve` closes it; `close` might not be allowed.
        std::mem::forget(listener);
        if is_taken { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Runs hooks of the container with no more rights than its program has, and its environment.
    pub(crate) fn run_confined_hooks(
        &self,
        kind: &'static str,
        listed: &[oci_spec::runtime::Hook],
        state: &str,
        env: &[CString],
    ) -> Result<(), InitError> {
        if self.filter.is_some_and(Filter::notifies) {
            // One listener is for all: whoever takes it knows the container's process only.
            self.prepare_filter()?;
            self.install_filter()?;
        }
        let confine = || self.confine().map_err(|error| error.to_string());
        Ok(hooks::run_with(kind, listed, state, env, &confine)?)
    }

    /// Where to report what fails: to whoever waits for news.
    pub(crate) fn report(&self, report: &[u8]) {
        let starter = self.starter.borrow();
        let to = starter.as_ref().map_or(self.verdict, AsFd::as_fd);
        // Without a reader, nobody is left to tell.
        let _ = rustix::io::write(to, report);
    }
}

/// Variables, of two with the same name the later one in the earlier's place: it counts, wherever a program looks. An image
/// may have very many.
fn unique(variables: &[CString]) -> Vec<CString> {
    let mut unique: Vec<CString> = Vec::with_capacity(variables.len() + 1);
    let mut places = HashMap::new();
    for variable in variables {
        let bytes = variable.as_bytes();
        let name = bytes.iter().position(|byte| *byte == b'=').and_then(|end| bytes.get(..end));
        match name.map(|name| places.entry(name)) {
            Some(hash_map::Entry::Occupied(place)) => {
                if let Some(earlier) = unique.get_mut(*place.get()) {
                    variable.clone_into(earlier);
                }
                continue;
            }
            Some(hash_map::Entry::Vacant(place)) => drop(place.insert(unique.len())),
            None => {}
        }
        unique.push(variable.clone());
    }
    unique
}

/// Through the caller's `/proc`, where `self` is this process, too.
pub(crate) fn set_oom_score(process: &str, value: i32) -> io::Result<()> {
    let file = format!("{process}/oom_score_adj");
    match procfs::write(&file, value.to_string().as_bytes()) {
        // Not being allowed to change it is fine if it need not change.
        Err(error) => match fs::read_to_string(format!("/proc/{file}")) {
            Ok(present) if present.trim().parse() == Ok(value) => Ok(()),
            _ => Err(error),
        },
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn strings(list: &[&str]) -> Vec<CString> {
        list.iter().map(|text| CString::new(*text).unwrap()).collect()
    }

    #[test]
    fn later_variable_of_a_name_takes_the_place_of_the_earlier_one() {
        let given = strings(&["A=1", "AB=2", "odd", "A=3", "=x", "odd", "A"]);
        assert_eq!(unique(&given), strings(&["A=3", "AB=2", "odd", "=x", "odd", "A"]));
    }

    #[test]
    fn variables_of_a_large_image_take_no_time() {
        let given: Vec<_> = (0..200_000).map(|n| CString::new(format!("{n:x}=")).unwrap()).collect();
        let started = Instant::now();
        assert_eq!(unique(&given).len(), given.len());
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
