//! `cloche run`.

use std::process::ExitCode;

use cloche_engine::{
    compare::{RunTrace, TraceLine, steps},
    request::RunRequest,
    run::{self, RunError},
    trace::{Mark, Trace},
};

use cloche_images::ResolveError;

use super::{
    home, reconciled,
    registry::{options, pull_for_run},
};
use crate::{
    arguments::{Global, PullPolicy, Run, TraceFormat},
    render,
};

/// 128 + SIGKILL.
const KILLED: u8 = 137;

/// Runs the sandbox in the foreground; its exit code becomes ours.
pub fn run(global: &Global, arguments: Run, started_ns: u64) -> anyhow::Result<ExitCode> {
    let format = arguments.trace;
    let (policy, registry) = (arguments.pull, options(&arguments.registry)?);
    let request = request(arguments);
    let home = home(global)?;
    let mut trace = Trace::default();
    trace.mark_at(Mark::CliExec, started_ns);
    reconciled(&home)?;
    if policy == PullPolicy::Always {
        pull_for_run(global, &request.image, &registry)?;
    }
    let warn = |what: &str| eprintln!("cloche: {what}");
    let outcome = match run::run(&home, &request, &mut trace, &warn) {
        // Looked for only where it was missed, so that a run of what is here pays nothing.
        Err(RunError::Image(ResolveError::NotFound(_))) if policy == PullPolicy::Missing => {
            pull_for_run(global, &request.image, &registry)?;
            run::run(&home, &request, &mut trace, &warn)?
        }
        result => result?,
    };
    let exit_code = outcome.exit.status.shell_code();
    if outcome.exit.oom_killed && exit_code == KILLED {
        match request.memory_bytes {
            Some(limit) => {
                let limit = render::bytes(limit);
                eprintln!("cloche: sandbox {} hit its memory limit of {limit} and was killed", outcome.id);
            }
            None => eprintln!("cloche: sandbox {} ran out of memory; give it more with --memory", outcome.id),
        }
    }
    if let Some(format) = format {
        print_trace(
            format,
            RunTrace {
                isolation: request.isolation,
                exit_code,
                host_memory_peak_bytes: outcome.host_memory_peak_bytes,
                marks: trace,
            },
        )?;
    }
    Ok(ExitCode::from(exit_code))
}

fn request(arguments: Run) -> RunRequest {
    RunRequest {
        image: arguments.image,
        isolation: arguments.isolation.into(),
        require: arguments.require.map(Into::into),
        command: arguments.command,
        entrypoint: arguments.entrypoint,
        env: arguments.env.into_iter().filter_map(with_value).collect(),
        workdir: arguments.workdir,
        user: arguments.user,
        hostname: arguments.hostname,
        name: arguments.name,
        interactive: arguments.interactive,
        remove: arguments.rm,
        read_only: arguments.read_only,
        mounts: [arguments.volume, arguments.mount, arguments.tmpfs].concat(),
        memory_bytes: arguments.memory.map(|bytes| bytes.0),
        millicpus: arguments.cpus,
        pids: arguments.pids_limit,
        kernel: arguments.kernel,
    }
}

/// As Docker: a name without a value is passed on if it is set here, else left out.
fn with_value(variable: String) -> Option<String> {
    if variable.contains('=') || variable.is_empty() {
        return Some(variable);
    }
    let value = std::env::var(&variable).ok()?;
    Some(format!("{variable}={value}"))
}

fn print_trace(format: TraceFormat, trace: RunTrace) -> anyhow::Result<()> {
    match format {
        TraceFormat::Json => eprintln!("{}", serde_json::to_string(&TraceLine { trace })?),
        TraceFormat::Table => {
            let first = trace.marks.stamps().first().map_or(0, |stamp| stamp.ns);
            let mut rows = vec![vec!["MARK".to_owned(), "AT ms".to_owned(), "STEP ms".to_owned()]];
            rows.extend(steps(&trace.marks).map(|(stamp, step)| {
                let at = render::milliseconds(stamp.ns - first);
                vec![stamp.name.name().to_owned(), at, render::milliseconds(step)]
            }));
            eprint!("{}", render::table(&rows, &[1, 2]));
            eprintln!(
                "host clock (CLOCK_MONOTONIC) from the first line of `main`; {} isolation",
                trace.isolation
            );
        }
    }
    Ok(())
}
