//! Runs an OCI bundle with stdin, stdout and stderr passed through: `run_bundle DIRECTORY [ID]`. For comparing this
//! runtime with others.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
};

use cloche_runtime::{ExitStatus, Launch, Oci, Rootfs, Stdio, launch};
use oci_spec::runtime::Spec;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let bundle = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    let id = arguments.next().unwrap_or_else(|| format!("run-bundle-{}", std::process::id()));
    match run(&bundle, &id) {
        Ok(code) => code.into(),
        Err((code, message)) => {
            eprintln!("run_bundle: {message}");
            code.into()
        }
    }
}

fn run(bundle: &Path, id: &str) -> Result<u8, (u8, String)> {
    let failed = |error: &dyn std::error::Error| {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            message += &format!(": {error}");
            source = error.source();
        }
        (125, message)
    };
    let spec = Spec::load(bundle.join("config.json")).map_err(|error| failed(&error))?;
    let root = spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path());
    let rootfs = Rootfs::Directory(bundle.join(root));
    let duplicate = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map_err(|error| failed(&error));
    let stdio = Stdio {
        stdin: duplicate(&io::stdin())?,
        stdout: duplicate(&io::stdout())?,
        stderr: duplicate(&io::stderr())?,
    };
    let mut container = launch(Launch {
        id,
        spec: &spec,
        user: None,
        filter: None,
        rootfs,
        stdio,
        kill_on_parent_death: true,
        approve: None,
        oci: Oci::default(),
    })
    .map_err(|error| (error.exit_code(), failed(&error).1))?;
    let exit = container.wait().map_err(|error| failed(&error))?;
    container.delete().map_err(|error| failed(&error))?;
    if exit.oom_killed {
        eprintln!("run_bundle: the memory limit was hit");
    }
    Ok(match exit.status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal(signo) => u8::try_from(128 + signo).unwrap_or(u8::MAX),
    })
}
