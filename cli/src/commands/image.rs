//! `cloche image`.

use std::{
    io::{self, IsTerminal, Seek, Write, stderr},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use cloche_images::{Image as StoredImage, LayerStart, LoadOptions, NoProgress, Progress, Reference, Store};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{each, print_json};
use crate::{
    arguments::{Global, Image},
    render,
};

/// Carries out the verb.
pub fn image(global: &Global, verb: Image) -> anyhow::Result<ExitCode> {
    let store = Store::open(super::home(global)?.images())?;
    match verb {
        Image::Load { file, name, quiet } => load(&store, &file, name.as_deref(), quiet),
        Image::Ls { json, quiet } => list(&store, json, quiet),
        Image::Rm { images } => each(&images, |image| {
            let removed = store.remove(image)?;
            removed.untagged.iter().for_each(|name| println!("Untagged: {name}"));
            removed.deleted.iter().for_each(|id| println!("Deleted: {id}"));
            Ok(())
        }),
        Image::Inspect { images } => {
            let mut found = Vec::new();
            let code = each(&images, |image| {
                found.push(store.resolve(image)?.inspect());
                Ok(())
            });
            print_json(&found)?;
            code
        }
    }
}

fn load(store: &Store, file: &Path, name: Option<&str>, quiet: bool) -> anyhow::Result<ExitCode> {
    let options = LoadOptions { name: name.map(str::parse::<Reference>).transpose()? };
    // Kept open until the end: the path of a spooled stdin leads through it.
    let (path, _spool) = match file.as_os_str() == "-" {
        true => spool_stdin()?,
        false => (file.to_owned(), None),
    };
    let loaded = if quiet || !stderr().is_terminal() {
        store.load(&path, &options, &NoProgress)
    } else {
        store.load(&path, &options, &Bar::default())
    };
    for image in loaded.with_context(|| format!("cannot load {}", file.display()))? {
        let names: Vec<String> = image.names.iter().map(Reference::short).collect();
        match (names.is_empty(), quiet) {
            (true, true) => println!("{}", image.id),
            (true, false) => println!("Loaded image ID: {}", image.id),
            (false, true) => names.iter().for_each(|name| println!("{name}")),
            (false, false) => names.iter().for_each(|name| println!("Loaded image: {name}")),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An archive's parts are looked up by position, which a pipe does not allow: it goes to an unnamed file first.
fn spool_stdin() -> anyhow::Result<(PathBuf, Option<std::fs::File>)> {
    anyhow::ensure!(
        !io::stdin().is_terminal(),
        "stdin is a terminal; pipe an archive into it or name a file"
    );
    let mut spool = tempfile::tempfile().context("cannot make a temporary file for the archive on stdin")?;
    io::copy(&mut io::stdin().lock(), &mut spool).context("cannot copy the archive on stdin")?;
    spool.flush()?;
    spool.rewind()?;
    Ok((format!("/proc/self/fd/{}", spool.as_raw_fd()).into(), Some(spool)))
}

/// One bar for the layer under way.
struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Self(ProgressBar::new(0))
    }
}

impl Progress for Bar {
    fn layer_started(&self, layer: &LayerStart) {
        let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        let id: String = layer.diff_id.hex().chars().take(12).collect();
        self.0.set_message(format!("layer {}/{} {id}", layer.index + 1, layer.count));
        self.0.set_length(layer.bytes);
        self.0.set_position(0);
    }

    fn layer_advanced(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn layer_finished(&self) {
        self.0.finish_and_clear();
    }
}

/// One image of `ls --json`.
#[derive(Serialize)]
struct Line {
    id: String,
    names: Vec<String>,
    created: Option<String>,
    layers: usize,
    bytes: u64,
}

fn list(store: &Store, json: bool, quiet: bool) -> anyhow::Result<ExitCode> {
    let images = store.images()?;
    if json {
        print_json(&images.iter().map(line).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    if quiet {
        images.iter().for_each(|image| println!("{}", short_id(image)));
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["NAME", "ID", "CREATED", "LAYERS", "SIZE"].map(String::from).to_vec()];
    for image in &images {
        let names = match image.names.as_slice() {
            [] => vec!["<none>".to_owned()],
            names => names.iter().map(Reference::short).collect(),
        };
        let created = image.created.as_deref().and_then(|created| created.get(..10)).unwrap_or("–");
        rows.extend(names.into_iter().map(|name| {
            let layers = image.layers.len().to_string();
            vec![name, short_id(image), created.to_owned(), layers, render::bytes(image.size)]
        }));
    }
    print!("{}", render::table(&rows, &[3, 4]));
    Ok(ExitCode::SUCCESS)
}

fn line(image: &StoredImage) -> Line {
    Line {
        id: image.id.to_string(),
        names: image.names.iter().map(Reference::short).collect(),
        created: image.created.clone(),
        layers: image.layers.len(),
        bytes: image.size,
    }
}

/// As Docker shows ids: 12 digits.
fn short_id(image: &StoredImage) -> String {
    image.id.hex().chars().take(12).collect()
}
