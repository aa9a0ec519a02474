//! What verbs print.

use std::process::Command;

use cloche_oci::{Error, Home, Inside};

use super::arguments::Format;

/// Prints a line.
pub fn line(text: &str) -> u8 {
    println!("{text}");
    0
}

pub fn list(home: &Home<'_>, format: Format, quiet: bool) -> Result<u8, Error> {
    let all = cloche_oci::list(home)?;
    if quiet {
        for known in &all {
            line(known.id());
        }
        return Ok(0);
    }
    let states: Vec<_> = all.iter().map(cloche_oci::Known::state).collect();
    match format {
        Format::Json => line(&json(&states)?),
        Format::Table => {
            let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from);
            let rows = states.iter().map(|state| {
                let bundle = state.bundle.display().to_string();
                let text =
                    [state.id, &state.pid.to_string(), state.status, &bundle, state.created, state.owner];
                text.map(String::from)
            });
            table(&[header].into_iter().chain(rows).collect::<Vec<_>>())
        }
    };
    Ok(0)
}

/// Prints columns as wide as their widest entry.
fn table(rows: &[[String; 6]]) -> u8 {
    for row in rows {
        let mut text = String::new();
        for (column, entry) in row.iter().enumerate() {
            let width = rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
            text += &format!("{entry:width$}   ");
        }
        line(text.trim_end());
    }
    0
}

pub fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::System("print JSON", error.into()))
}

/// What another kernel says of its processes: ps(1) of this machine cannot.
fn processes_seen(inside: &[Inside], options: &[String]) -> Result<u8, Error> {
    if !options.is_empty() {
        return Err(Error::Request(
            "options of ps(1) are for processes of this machine, and these are a virtual machine's".into(),
        ));
    }
    line(&format!("{:<8} {:>7} {:>7} CMD", "UID", "PID", "PPID"));
    for Inside { pid, seen } in inside {
        if let Some(seen) = seen {
            line(&format!("{:<8} {pid:>7} {:>7} {}", seen.uid, seen.parent, seen.command));
        }
    }
    Ok(0)
}

/// Processes of a container: their ids, or the lines of ps(1) that are about them.
pub fn processes(home: &Home<'_>, id: &str, format: Format, options: &[String]) -> Result<u8, Error> {
    let inside = cloche_oci::processes(home, id)?;
    let pids: Vec<_> = inside.iter().map(|process| process.pid).collect();
    if format == Format::Json {
        return Ok(line(&json(&pids)?));
    }
    if home.shows_processes() {
        return processes_seen(&inside, options);
    }
    let default = ["-ef".to_owned()];
    let output = Command::new("ps").args(if options.is_empty() { &default } else { options }).output();
    let output = output.map_err(|source| Error::System("run ps; install procps", source))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_whitespace().position(|name| name == "PID");
    let column = column.ok_or_else(|| Error::Request("these options of ps print no column PID".into()))?;
    line(header);
    for entry in lines {
        let pid = entry.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            line(entry);
        }
    }
    Ok(0)
}
