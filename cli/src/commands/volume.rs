//! `cloche volume`.

use std::process::ExitCode;

use cloche_engine::volumes::Volumes;

use super::{home, print_json};
use crate::{
    arguments::{Global, Volume},
    render,
};

/// Carries out one of its verbs.
pub fn volume(global: &Global, verb: Volume) -> anyhow::Result<ExitCode> {
    let volumes = Volumes::new(home(global)?.volumes());
    match verb {
        Volume::Create { names } => {
            for name in names {
                volumes.create(&name)?;
                println!("{name}");
            }
        }
        Volume::Ls { json, quiet } => {
            let all = volumes.list()?;
            if json {
                print_json(&all)?;
            } else if quiet {
                all.iter().for_each(|volume| println!("{}", volume.name));
            } else {
                let mut rows = vec![["NAME", "CREATED", "IN USE"].map(String::from).to_vec()];
                rows.extend(all.into_iter().map(|volume| {
                    let in_use = if volume.in_use { "yes" } else { "no" };
                    vec![volume.name, render::age(volume.created), in_use.into()]
                }));
                print!("{}", render::table(&rows, &[]));
            }
        }
        Volume::Inspect { names } => {
            let found: Vec<_> = names.iter().map(|name| volumes.inspect(name)).collect::<Result<_, _>>()?;
            print_json(&found)?;
        }
        Volume::Rm { names } => return Ok(remove(&volumes, &names)),
        Volume::Prune => volumes.prune()?.iter().for_each(|name| println!("{name}")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Goes on after one that cannot be removed.
fn remove(volumes: &Volumes, names: &[String]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match volumes.remove(name) {
            Ok(()) => println!("{name}"),
            Err(error) => {
                eprintln!("cloche: {:#}", anyhow::Error::new(error));
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
