//! `cloche system`, `cloche image verify`, `cloche image prune`: what is on disk, and whether it is right.

use std::{collections::HashSet, process::ExitCode};

use cloche_engine::{record::State, rootless::Trees, volumes::Volumes};
use serde::Serialize;

use super::{
    home,
    image::{store, sweep_trees, whole},
    print_json, reconciled,
};
use crate::{
    arguments::{Global, System},
    render,
};

/// Carries out the verb.
pub fn system(global: &Global, verb: &System) -> anyhow::Result<ExitCode> {
    match verb {
        System::Df { json } => df(global, *json),
    }
}

/// One line of `df`.
#[derive(Serialize)]
struct Line {
    kind: &'static str,
    count: usize,
    active: usize,
    bytes: Option<u64>,
    reclaimable_bytes: Option<u64>,
}

/// The ids of images that running sandboxes use.
fn in_use(global: &Global) -> anyhow::Result<HashSet<String>> {
    let entries = reconciled(&home(global)?)?.entries()?;
    let runs = entries.into_iter().filter(|entry| !matches!(entry.record.state, State::Exited(_)));
    Ok(runs.map(|entry| entry.record.image_id).collect())
}

fn df(global: &Global, json: bool) -> anyhow::Result<ExitCode> {
    let home = home(global)?;
    let (store, used) = (store(global)?, in_use(global)?);
    let (images, usage) = (whole(&store)?, store.usage()?);
    let is_used = |id: &cloche_images::Digest| used.contains(&id.to_string());
    // A layer that an image in use shares stays.
    let needed: HashSet<_> = images
        .iter()
        .filter(|image| is_used(&image.id))
        .flat_map(|image| &image.layers)
        .map(|layer| layer.diff_id)
        .collect();
    let all: HashSet<_> = images
        .iter()
        .flat_map(|image| &image.layers)
        .map(|layer| (layer.diff_id, layer.erofs_bytes))
        .collect();
    let free = all.iter().filter(|(id, _)| !needed.contains(id)).map(|(_, bytes)| bytes).sum();
    let sandboxes = reconciled(&home)?.entries()?;
    let running = sandboxes.iter().filter(|entry| !matches!(entry.record.state, State::Exited(_))).count();
    let volumes = Volumes::new(home.volumes()).list()?;
    let trees = Trees::new(home.trees()).usage()?;
    let (steps, caches) = (store.step_usage()?, cloche_build::cache_mounts(&home)?);
    let lines = [
        Line {
            kind: "images",
            count: images.len(),
            active: images.iter().filter(|image| is_used(&image.id)).count(),
            // Layers that only steps have are in their own line.
            bytes: Some(usage.layers.saturating_sub(steps.bytes)),
            reclaimable_bytes: Some(free),
        },
        Line {
            kind: "images, as they came",
            count: images.len(),
            active: 0,
            bytes: Some(usage.blobs),
            reclaimable_bytes: None,
        },
        Line {
            kind: "images, unpacked for a plain user",
            count: trees.count,
            active: trees.active,
            bytes: Some(trees.bytes),
            reclaimable_bytes: None,
        },
        Line {
            kind: "broken-off downloads",
            count: usize::from(usage.partial > 0),
            active: 0,
            bytes: Some(usage.partial),
            reclaimable_bytes: Some(usage.partial),
        },
        Line {
            kind: "steps of builds",
            count: steps.steps,
            active: 0,
            bytes: Some(steps.bytes),
            reclaimable_bytes: Some(steps.bytes),
        },
        Line {
            kind: "caches of RUN",
            count: caches.count,
            active: 0,
            bytes: Some(caches.bytes),
            reclaimable_bytes: Some(caches.bytes),
        },
        Line {
            kind: "sandboxes",
            count: sandboxes.len(),
            active: running,
            bytes: None,
            reclaimable_bytes: None,
        },
        Line {
            kind: "volumes",
            count: volumes.len(),
            active: volumes.iter().filter(|volume| volume.in_use).count(),
            bytes: None,
            reclaimable_bytes: None,
        },
    ];
    if json {
        print_json(&lines)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"].map(String::from).to_vec()];
    let bytes = |bytes: Option<u64>| bytes.map_or("–".to_owned(), render::bytes);
    rows.extend(lines.iter().map(|line| {
        let (count, active) = (line.count.to_string(), line.active.to_string());
        vec![line.kind.to_owned(), count, active, bytes(line.bytes), bytes(line.reclaimable_bytes)]
    }));
    print!("{}", render::table(&rows, &[1, 2, 3, 4]));
    Ok(ExitCode::SUCCESS)
}

/// Looks at all that images have.
pub fn verify(global: &Global, images: &[String]) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let mut code = ExitCode::SUCCESS;
    let images = match images {
        // By their ids, as not all have names.
        [] => {
            let mut whole = Vec::new();
            for image in store.each_image()? {
                match image {
                    Ok(image) => whole.push(image.id.to_string()),
                    Err(error) => {
                        code = ExitCode::FAILURE;
                        eprintln!("cloche: {:#}", anyhow::Error::new(error));
                    }
                }
            }
            whole
        }
        images => images.to_vec(),
    };
    for image in images {
        match store.verify(&image) {
            Ok(damage) if damage.is_empty() => println!("{image}: whole"),
            Ok(damage) => {
                code = ExitCode::FAILURE;
                for problem in damage {
                    eprintln!("cloche: {image}: {:#}", anyhow::Error::new(problem));
                }
            }
            Err(error) => {
                code = ExitCode::FAILURE;
                eprintln!("cloche: {:#}", anyhow::Error::new(error));
            }
        }
    }
    Ok(code)
}

/// Removes images that nobody needs.
pub fn prune(global: &Global, all: bool) -> anyhow::Result<ExitCode> {
    let used = in_use(global)?;
    let store = store(global)?;
    let pruned = store.prune(all, |id| used.contains(&id.to_string()))?;
    sweep_trees(global, &store)?;
    pruned.images.iter().for_each(|id| println!("Deleted: {id}"));
    println!("Freed: {}", render::bytes(pruned.bytes));
    Ok(ExitCode::SUCCESS)
}
