//! `cloche doctor`.

use std::{
    io::{IsTerminal, stdout},
    process::ExitCode,
};

use cloche_engine::doctor::{Finding, Verdict, examine};

use super::print_json;
use crate::arguments::Doctor;

/// Reports what this machine can run.
pub fn doctor(arguments: &Doctor) -> anyhow::Result<ExitCode> {
    let report = examine();
    if arguments.quiet {
        return Ok(if report.vm { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if arguments.json {
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = report.findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
    for finding in &report.findings {
        println!("{}  {:<width$}  {}", sign(finding), finding.subject, finding.detail);
        if let Some(remedy) = &finding.remedy {
            println!("      {:<width$}  → {remedy}", "");
        }
    }
    let works = |works: bool| if works { "works here" } else { "does not work here" };
    println!("\ncontainer isolation {}; VM isolation {}", works(report.container), works(report.vm));
    Ok(ExitCode::SUCCESS)
}

/// A word, coloured on a terminal.
fn sign(finding: &Finding) -> String {
    let (word, colour) = match finding.verdict {
        Verdict::Good => ("  ok", 32),
        Verdict::Slow => ("slow", 33),
        Verdict::Missing => ("FAIL", 31),
    };
    let coloured = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if coloured { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.into() }
}
