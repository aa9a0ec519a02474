//! `cloche image`.

use std::{
    fs::Permissions,
    io::{self, BufWriter, IsTerminal, Seek, Write, stderr},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use cloche_engine::rootless::Trees;
use cloche_images::{Image as StoredImage, LayerStart, LoadOptions, NoProgress, Progress, Reference, Store};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{each, layers, print_json, registry, system};
use crate::{
    arguments::{ArchiveFormat, Global, Image, ImageLs, ImageNames, Import, Load, Save, Tag},
    render,
};

/// Carries out the verb.
pub fn image(global: &Global, verb: Image) -> anyhow::Result<ExitCode> {
    match verb {
        Image::Pull(arguments) => registry::pull(global, &arguments),
        Image::Push(arguments) => registry::push(global, &arguments),
        Image::Load(arguments) => load(global, &arguments),
        Image::Save(arguments) => save(global, &arguments),
        Image::Import(arguments) => import(global, &arguments),
        Image::Tag(arguments) => tag(global, &arguments),
        Image::Ls(arguments) => list(global, &arguments),
        Image::Rm(arguments) => remove(global, &arguments),
        Image::History(arguments) => layers::history(global, &arguments),
        Image::Layers(arguments) => layers::layers(global, &arguments),
        Image::Verify { images } => system::verify(global, &images),
        Image::Prune { all } => system::prune(global, all),
        Image::Inspect(ImageNames { images }) => {
            let store = store(global)?;
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

/// The image store.
pub fn store(global: &Global) -> anyhow::Result<Store> {
    Ok(Store::open(super::home(global)?.images())?)
}

/// Removes names, and with the last one the image.
pub fn remove(global: &Global, arguments: &ImageNames) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let code = each(&arguments.images, |image| {
        let removed = store.remove(image)?;
        removed.untagged.iter().for_each(|name| println!("Untagged: {name}"));
        removed.deleted.iter().for_each(|id| println!("Deleted: {id}"));
        Ok(())
    });
    sweep_trees(global, &store)?;
    code
}

/// Removes what a plain user has unpacked of images that are gone.
pub fn sweep_trees(global: &Global, store: &Store) -> anyhow::Result<()> {
    Ok(Trees::new(super::home(global)?.trees()).sweep(store)?)
}

/// Gives an image one more name.
pub fn tag(global: &Global, arguments: &Tag) -> anyhow::Result<ExitCode> {
    let name: Reference = arguments.name.parse()?;
    anyhow::ensure!(
        name.digest().is_none(),
        "{} has a digest; a name that is given has a tag",
        arguments.name
    );
    store(global)?.tag(&arguments.image, &name)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes an image of a file system.
pub fn import(global: &Global, arguments: &Import) -> anyhow::Result<ExitCode> {
    let name = arguments.name.as_deref().map(str::parse::<Reference>).transpose()?;
    let (path, _spool) = file_or_stdin(&arguments.file)?;
    let imported = store(global)?.import(&path, name.as_ref(), &arguments.change, &arguments.message);
    println!("{}", imported.with_context(|| format!("cannot import {}", arguments.file.display()))?);
    Ok(ExitCode::SUCCESS)
}

fn file_or_stdin(file: &Path) -> anyhow::Result<(PathBuf, Option<std::fs::File>)> {
    match file.as_os_str() == "-" {
        true => spool_stdin(),
        false => Ok((file.to_owned(), None)),
    }
}

/// Saves images.
pub fn save(global: &Global, arguments: &Save) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let images = &arguments.images;
    if let Some(directory) = &arguments.directory {
        store.save_to_directory(images, directory)?;
        return Ok(ExitCode::SUCCESS);
    }
    write_archive(arguments.output.as_deref(), |output| {
        Ok(match arguments.format {
            ArchiveFormat::OciArchive => store.save(images, output),
            ArchiveFormat::DockerArchive => store.save_for_docker(images, output),
        }?)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Has an archive written to a file, or to stdout if that is no terminal.
pub fn write_archive(
    path: Option<&Path>,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Some(path) = path else {
        anyhow::ensure!(
            !io::stdout().is_terminal(),
            "stdout is a terminal; pipe it somewhere, or give --output FILE"
        );
        return write(&mut BufWriter::with_capacity(1 << 20, io::stdout().lock()));
    };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Under its name only when it is whole.
    let new = tempfile::Builder::new().permissions(Permissions::from_mode(0o644)).tempfile_in(directory);
    let mut new = new.with_context(|| format!("cannot create a file in {}", directory.display()))?;
    write(&mut BufWriter::with_capacity(1 << 20, new.as_file_mut()))?;
    new.as_file().sync_all().with_context(|| format!("cannot write {}", path.display()))?;
    new.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Loads images.
pub fn load(global: &Global, arguments: &Load) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let file = arguments.input.as_ref().unwrap_or(&arguments.file);
    let (name, quiet) = (&arguments.name, arguments.quiet);
    let options = LoadOptions { name: name.as_deref().map(str::parse::<Reference>).transpose()? };
    // Kept open until the end: the path of a spooled stdin leads through it.
    let (path, _spool) = file_or_stdin(file)?;
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

/// The images that are whole. Of the others it is said what is wrong, so that they can be found and removed.
pub(super) fn whole(store: &Store) -> anyhow::Result<Vec<StoredImage>> {
    let said = |image: Result<StoredImage, _>| {
        image.map_err(|error| eprintln!("cloche: {:#}", anyhow::Error::new(error))).ok()
    };
    Ok(store.each_image()?.into_iter().filter_map(said).collect())
}

/// Lists images.
pub fn list(global: &Global, arguments: &ImageLs) -> anyhow::Result<ExitCode> {
    let images = whole(&store(global)?)?;
    if arguments.json {
        print_json(&images.iter().map(line).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.quiet {
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
