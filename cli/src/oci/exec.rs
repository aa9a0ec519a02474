//! `exec`: the process that its options describe.

use std::fs;

use cloche_oci::{Error, Execution, Home, Preserved};
use oci_spec::runtime::{Capability, Process};

use super::arguments::Exec;

pub fn exec(
    home: &Home<'_>,
    exec: &Exec,
    preserved: &Preserved,
    warn: &dyn Fn(&str),
    debug: &dyn Fn(&str),
) -> Result<u8, Error> {
    let process = |own: &Process| match &exec.process {
        Some(path) => {
            let text = fs::read(path).map_err(|source| Error::File {
                action: "read",
                path: path.clone(),
                source,
            })?;
            let mut process = process_of(&text, own)
                .map_err(|source| Error::Config { path: path.clone(), source: source.into() })?;
            if exec.tty {
                // Engines say so twice.
                process.set_terminal(Some(true));
            }
            Ok(process)
        }
        None => like(own, exec, warn),
    };
    cloche_oci::exec(
        home,
        &Execution {
            id: &exec.id,
            process: &process,
            detach: exec.detach,
            pid_file: exec.pid_file.as_deref(),
            console_socket: exec.console_socket.as_deref(),
            preserved,
            cgroup: &exec.cgroup,
            ignore_paused: exec.ignore_paused,
            warn,
            debug,
        },
    )
}

/// A process as JSON; without a user it is root's, and without a directory it runs in the root. Rights and limits of which
/// it says nothing are those of the container's own process, as with other runtimes.
fn process_of(text: &[u8], own: &Process) -> Result<Process, serde_json::Error> {
    let mut process: serde_json::Value = serde_json::from_slice(text)?;
    if let Some(fields) = process.as_object_mut() {
        fields.entry("user").or_insert_with(|| serde_json::json!({ "uid": 0, "gid": 0 }));
        fields.entry("cwd").or_insert_with(|| "/".into());
    }
    let mut process: Process = serde_json::from_value(process)?;
    if process.capabilities().is_none() {
        process.set_capabilities(own.capabilities().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(own.rlimits().clone());
    }
    if process.apparmor_profile().as_ref().is_none_or(String::is_empty) {
        process.set_apparmor_profile(own.apparmor_profile().clone());
    }
    if process.selinux_label().as_ref().is_none_or(String::is_empty) {
        process.set_selinux_label(own.selinux_label().clone());
    }
    Ok(process)
}

/// The container's own process, changed as the options say.
fn like(own: &Process, exec: &Exec, warn: &dyn Fn(&str)) -> Result<Process, Error> {
    let mut process = own.clone();
    if exec.command.is_empty() {
        return Err(Error::Request("what to run is missing; give a command, or --process FILE".into()));
    }
    process.set_args(Some(exec.command.clone()));
    process.set_terminal(Some(exec.tty));
    process.set_console_size(None);
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(user) = &exec.user {
        let (uid, gid) = user.split_once(':').map_or((user.as_str(), None), |(uid, gid)| (uid, Some(gid)));
        let number = |text: &str| {
            text.parse::<u32>()
                .map_err(|_| Error::Request(format!("--user {user}: `{text}` is not a number")))
        };
        process.user_mut().set_uid(number(uid)?);
        if let Some(gid) = gid {
            process.user_mut().set_gid(number(gid)?);
        }
    }
    if !exec.additional_gids.is_empty() {
        let mut gids = process.user().additional_gids().clone().unwrap_or_default();
        gids.extend(&exec.additional_gids);
        process.user_mut().set_additional_gids(Some(gids));
    }
    if !exec.env.is_empty() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(exec.env.iter().cloned());
        process.set_env(Some(env));
    }
    if exec.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = &exec.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(label) = &exec.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    for name in &exec.cap {
        if !add_capability(&mut process, name) {
            warn(&format!("ignored: --cap {name}, which is no capability"));
        }
    }
    Ok(process)
}

/// Adds a capability to what the process has and may have.
fn add_capability(process: &mut Process, name: &str) -> bool {
    let Ok(capability) = serde_json::from_value::<Capability>(name.to_ascii_uppercase().into()) else {
        return false;
    };
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<oci_spec::runtime::Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.insert(capability);
        Some(set)
    };
    sets.set_bounding(with(sets.bounding()));
    sets.set_effective(with(sets.effective()));
    sets.set_permitted(with(sets.permitted()));
    process.set_capabilities(Some(sets));
    true
}
