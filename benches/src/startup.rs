//! The start-up benchmark: every contender once per round, round after round, so that whatever changes on the machine
//! changes for all.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::contender::{Contender, find_program};
use crate::guest_cost;
use crate::port_trace::PortTrace;
use crate::report::{Phase, Report, Row};
use crate::statistics::Summary;
use crate::stopwatch::{Lap, settle, time};
use crate::surroundings::Surroundings;
use crate::vm_start::{Guests, VmLap};
use crate::vmms::{self, Kind, Vmm};

/// A contender with its laps.
struct Entrant {
    contender: Contender,
    laps: Vec<Lap>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// All but VMs.
    WithoutVms,
    /// The VMMs alone, with a guest that does nothing.
    Vmms,
}

/// Measures it.
pub fn measure(runs: u32, warm_up: u32, scope: Scope) -> Result<Report> {
    let cloche = vmms::cloche()?;
    let scratch = tempfile::Builder::new().prefix("cloche-bench.").tempdir().context("make a directory")?;
    let mut missing = Vec::new();
    let mut contenders = Vec::new();
    let mut programs = vec![cloche.clone()];
    if scope != Scope::Vmms {
        contenders = commands(&cloche, scope, scratch.path(), &mut programs, &mut missing)?;
    }
    let guests = Guests::write(scratch.path())?;
    let mut vmms: Vec<(Vmm, Vec<VmLap>)> = Vec::new();
    let mut vmm_costs = Vec::new();
    let trace = match scope {
        Scope::WithoutVms => None,
        Scope::All | Scope::Vmms => Some(PortTrace::start()?),
    };
    if let Some(trace) = &trace {
        let (found, lacking) = vmms::all(&cloche)?;
        missing.extend(lacking);
        for vmm in found {
            let tried = (0..warm_up.max(1))
                .try_for_each(|_| guests.time(&vmm, trace).map(drop))
                .and_then(|()| guests.look(&vmm));
            match tried {
                Ok(cost) => {
                    if vmm.kind != Kind::Cloche {
                        programs.push(vmm.program().to_owned());
                    }
                    vmm_costs.push(cost);
                    vmms.push((vmm, Vec::new()));
                }
                Err(error) if vmm.kind != Kind::Cloche => {
                    missing.push(format!("{}: does not run here: {error:#}", vmm.kind.name()));
                }
                Err(error) => return Err(error.context(format!("warm up {}", vmm.kind.name()))),
            }
        }
    }

    let mut entrants = Vec::new();
    for mut contender in contenders {
        match warm(&mut contender, warm_up) {
            Ok(()) => entrants.push(Entrant { contender, laps: Vec::new() }),
            // A peer may not work everywhere. Without Cloche itself there is nothing to say.
            Err(error) if is_peer(contender.name) => {
                missing.push(format!("{}: does not run here: {error:#}", contender.name));
            }
            Err(error) => return Err(error.context(format!("warm up {}", contender.name))),
        }
    }
    for round in 1..=runs {
        eprintln!("cloche-bench: round {round} of {runs}");
        for entrant in &mut entrants {
            settle(round);
            let lap = time(&mut entrant.contender.next_command());
            entrant.laps.push(lap.with_context(|| format!("measure {}", entrant.contender.name))?);
        }
        for (vmm, laps) in &mut vmms {
            let Some(trace) = &trace else { continue };
            settle(round);
            laps.push(guests.time(vmm, trace).with_context(|| format!("measure {}", vmm.kind.name()))?);
        }
    }
    let programs: Vec<&Path> = programs.iter().map(PathBuf::as_path).collect();
    Ok(Report {
        runs,
        warm_up,
        surroundings: Surroundings::explore(&programs),
        rows: entrants
            .iter()
            .filter(|entrant| !is_traced(entrant))
            .flat_map(rows)
            .chain(vmms.iter().flat_map(vmm_rows))
            .collect(),
        vmm_costs,
        phases: entrants.iter().filter(|entrant| is_traced(entrant)).map(phases).collect::<Result<_>>()?,
        guest_cost: if scope == Scope::All { Some(guest_cost::take(&cloche)?) } else { None },
        missing,
    })
}

/// Cloche and other runtimes, as commands.
fn commands(
    cloche: &Path,
    scope: Scope,
    scratch: &Path,
    programs: &mut Vec<PathBuf>,
    missing: &mut Vec<String>,
) -> Result<Vec<Contender>> {
    let bundle = Bundle::make(cloche, scratch.join("bundle"))?;
    let mut contenders = own_contenders(cloche, scope == Scope::All);
    for name in ["crun", "runc"] {
        match find_program(name) {
            Some(program) => {
                contenders.push(Contender::peer(name, &program, &bundle, &scratch.join(name)));
                programs.push(program);
            }
            None => missing.push(format!("{name}: not found on this machine")),
        }
    }
    contenders.push(Contender::process("process", &bundle));
    Ok(contenders)
}

fn own_contenders(cloche: &Path, with_vm: bool) -> Vec<Contender> {
    let mut contenders = vec![
        Contender::cloche_true("cloche container", cloche, "container"),
        Contender::cloche_traced("cloche container traced", cloche, "container"),
    ];
    if with_vm {
        contenders.push(Contender::cloche_echo("cloche vm", cloche, "vm"));
        contenders.push(Contender::cloche_traced("cloche vm traced", cloche, "vm"));
    }
    contenders
}

fn is_peer(name: &str) -> bool {
    name == "crun" || name == "runc"
}

fn is_traced(entrant: &Entrant) -> bool {
    entrant.contender.name.ends_with("traced")
}

/// At least one run, to find out whether it works at all.
fn warm(contender: &mut Contender, rounds: u32) -> Result<()> {
    for _ in 0..rounds.max(1) {
        time(&mut contender.next_command())?;
    }
    Ok(())
}

fn rows(entrant: &Entrant) -> Vec<Row> {
    let name = entrant.contender.name;
    let series = |to: fn(&Lap) -> Option<u64>| -> Vec<u64> {
        entrant.laps.iter().filter_map(|lap| to(lap).map(|end| end.saturating_sub(lap.start_ns))).collect()
    };
    let row = |until: &'static str, series_ns: Vec<u64>| {
        Summary::of(&series_ns).map(|summary| Row { contender: name, until, summary, series_ns })
    };
    let first_byte =
        entrant.contender.prints.then(|| row("first byte", series(|lap| lap.first_byte_ns))).flatten();
    first_byte.into_iter().chain(row("exit", series(|lap| Some(lap.end_ns)))).collect()
}

fn vmm_rows((vmm, laps): &(Vmm, Vec<VmLap>)) -> Vec<Row> {
    let row = |until: &'static str, to: fn(&VmLap) -> u64| {
        let series_ns: Vec<u64> = laps.iter().map(to).collect();
        Summary::of(&series_ns).map(|summary| Row { contender: vmm.kind.name(), until, summary, series_ns })
    };
    let to_init = row("/init", |lap| lap.init_ns.saturating_sub(lap.start_ns));
    let to_end = row("/init → reaped", |lap| lap.end_ns.saturating_sub(lap.init_ns));
    to_init.into_iter().chain(to_end).collect()
}

/// The medians of the steps between one mark and the next, in the order of the first run's marks.
fn phases(entrant: &Entrant) -> Result<(&'static str, Vec<Phase>)> {
    let runs: Vec<Vec<(String, u64)>> = entrant.laps.iter().map(steps).collect::<Result<_>>()?;
    let names = runs.first().into_iter().flatten().map(|(name, _)| name.clone());
    let phases = names.filter_map(|name| {
        let of_name =
            |run: &Vec<(String, u64)>| run.iter().find(|(known, _)| *known == name).map(|(_, ns)| *ns);
        let series: Vec<u64> = runs.iter().filter_map(of_name).collect();
        Some(Phase { summary: Summary::of(&series)?, until: name })
    });
    Ok((entrant.contender.name.trim_end_matches(" traced"), phases.collect()))
}

/// Time from each mark's predecessor to the mark; the first one's predecessor is the spawn.
fn steps(lap: &Lap) -> Result<Vec<(String, u64)>> {
    let line =
        lap.stderr.lines().find(|line| line.starts_with(r#"{"trace":"#)).context("no trace on stderr")?;
    let document: Value = serde_json::from_str(line).context("read a trace")?;
    let marks = document["trace"]["marks"].as_array().context("a trace has marks")?;
    let mut previous = lap.start_ns;
    let mut steps = Vec::new();
    for mark in marks {
        let name = mark["name"].as_str().context("a mark has a name")?.to_owned();
        let ns = mark["ns"].as_u64().context("a mark has a time")?;
        steps.push((name, ns.saturating_sub(previous)));
        previous = ns;
    }
    steps.push(("waited for".to_owned(), lap.end_ns.saturating_sub(previous)));
    Ok(steps)
}
