//! `cloche pull`, `push`, `search`, `login`, `logout`: what has to do with registries.

use std::{
    collections::HashMap,
    io::{self, BufRead, IsTerminal, Read, stderr},
    process::ExitCode,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use cloche_images::{
    Digest, NoProgress, Reference, Store,
    registry::{
        self, CredentialStore, Mirrors, Proxies, Pulled, Pushed, RegistryOptions, Repository, Step, Transfer,
    },
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{each, image::store, print_json};
use crate::{
    arguments::{Global, Login, Logout, Pull, Push, Registry, Search},
    render, terminal,
};

/// A repository that no registry has, to ask a registry by who we are.
const NOWHERE: &str = "cloche/login";
const MAX_PASSWORD_BYTES: u64 = 64 << 10;
/// Letters of a description in a table, as Docker has it.
const DESCRIPTION: usize = 45;

/// How to speak with registries, as the user wants it.
pub fn options(registry: &Registry) -> anyhow::Result<RegistryOptions> {
    Ok(RegistryOptions {
        trust_loopback: !registry.tls_verify,
        credentials: CredentialStore::of_user().ok(),
        proxies: Proxies::of_environment()?,
        mirrors: Mirrors::of_environment()?,
        ..RegistryOptions::default()
    })
}

/// Pulls images.
pub fn pull(global: &Global, arguments: &Pull) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let options = options(&arguments.registry)?;
    let names = match arguments.all_tags {
        true => all_tags(&arguments.images, &options)?,
        false => arguments.images.clone(),
    };
    each(&names, |image| {
        let reference: Reference = image.parse()?;
        let pulled = pull_one(&store, &reference, &options, arguments.quiet)?;
        if arguments.quiet {
            println!("{}", pulled.digest);
            return Ok(());
        }
        println!("Digest: {}", pulled.digest);
        println!("{}: {}", if pulled.up_to_date { "Up to date" } else { "Pulled" }, reference.short());
        Ok(())
    })
}

/// Each of these repositories under each of its tags.
fn all_tags(repositories: &[String], options: &RegistryOptions) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for given in repositories {
        let has_tag = given.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
        ensure!(!has_tag, "{given} has a tag or a digest; with --all-tags, give a repository alone");
        let reference: Reference = given.parse()?;
        let tags = Repository::open(&reference, false, options).and_then(|repository| repository.tags());
        let tags = tags.with_context(|| format!("cannot list the tags of {given}"))?;
        ensure!(!tags.is_empty(), "{given} has no tags");
        for tag in tags {
            names.push(reference.with_tag(&tag)?.to_string());
        }
    }
    Ok(names)
}

/// Looks for images.
pub fn search(arguments: &Search) -> anyhow::Result<ExitCode> {
    let options = options(&arguments.registry)?;
    let found = registry::search(&arguments.term, arguments.limit as usize, &options)
        .with_context(|| format!("cannot search for {:?}", arguments.term))?;
    if arguments.json {
        print_json(&found)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["NAME", "DESCRIPTION", "STARS", "OFFICIAL"].map(String::from).to_vec()];
    rows.extend(found.into_iter().map(|found| {
        // Anybody can have written these.
        let plain =
            |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
        let mut description = plain(&found.description);
        if !arguments.no_trunc && description.chars().count() > DESCRIPTION {
            description = description.chars().take(DESCRIPTION - 1).chain(['…']).collect();
        }
        let official = if found.official { "yes" } else { "" };
        vec![plain(&found.name), description, found.stars.to_string(), official.to_owned()]
    }));
    print!("{}", render::table(&rows, &[2]));
    Ok(ExitCode::SUCCESS)
}

/// Pushes images.
pub fn push(global: &Global, arguments: &Push) -> anyhow::Result<ExitCode> {
    let store = store(global)?;
    let options = options(&arguments.registry)?;
    each(&arguments.images, |image| {
        let reference: Reference = image.parse()?;
        let push = || -> anyhow::Result<Pushed> {
            let mut repository = Repository::open(&reference, true, &options)?;
            let quiet = arguments.quiet;
            Ok(with_progress(quiet, |progress| store.push(&reference, &mut repository, progress))?)
        };
        let pushed = push().with_context(|| format!("cannot push {}", reference.short()))?;
        match arguments.quiet {
            true => println!("{}", pushed.digest),
            false => {
                println!("Pushed: {} digest: {} size: {}", reference.short(), pushed.digest, pushed.bytes)
            }
        }
        Ok(())
    })
}

/// Gets the image for a run, and says so, as that can take its time.
pub fn pull_for_run(global: &Global, image: &str, options: &RegistryOptions) -> anyhow::Result<()> {
    let reference: Reference = image.parse()?;
    eprintln!("cloche: pulling {}", reference.short());
    pull_one(&store(global)?, &reference, options, false)?;
    Ok(())
}

fn pull_one(
    store: &Store,
    reference: &Reference,
    options: &RegistryOptions,
    quiet: bool,
) -> anyhow::Result<Pulled> {
    let failed = |mirror: &str, error| {
        let error = anyhow::Error::new(error);
        eprintln!("cloche: the mirror {mirror} does not serve {}: {error:#}", reference.short());
    };
    let pulled = with_progress(quiet, |progress| store.pull_from_any(reference, options, progress, &failed));
    pulled.with_context(|| format!("cannot pull {}", reference.short()))
}

/// Does something with a bar for each layer, if anybody looks.
pub fn with_progress<T>(quiet: bool, action: impl FnOnce(&dyn Transfer) -> T) -> T {
    if quiet || !stderr().is_terminal() { action(&NoProgress) } else { action(&Bars::default()) }
}

/// A bar for each layer under way.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn bar(&self, layer: Digest) -> ProgressBar {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.entry(layer).or_insert_with(|| self.all.add(ProgressBar::new(0))).clone()
    }
}

impl Transfer for Bars {
    fn started(&self, layer: Digest, step: Step, bytes: u64) {
        let bar = self.bar(layer);
        let template = "{prefix} {msg:11} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(layer.hex().chars().take(12).collect::<String>());
        bar.set_message(match step {
            Step::Download => "downloading",
            Step::Convert => "converting",
            Step::Upload => "uploading",
        });
        bar.reset_eta();
        bar.set_length(bytes);
        bar.set_position(0);
    }

    fn moved(&self, layer: Digest, position: u64) {
        self.bar(layer).set_position(position);
    }

    fn finished(&self, layer: Digest, present: bool) {
        let bar = self.bar(layer);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(layer.hex().chars().take(12).collect::<String>());
        bar.finish_with_message(if present { "already there" } else { "done" });
    }
}

/// Proves to a registry who we are, and keeps what proves it.
pub fn login(arguments: &Login) -> anyhow::Result<ExitCode> {
    let reference = on(&arguments.server)?;
    let domain = reference.domain();
    let user = match &arguments.username {
        Some(user) => user.clone(),
        None => ask_user()?,
    };
    let password =
        if arguments.password_stdin { password_on_stdin()? } else { terminal::ask_secret("Password: ")? };
    ensure!(!user.is_empty() && !password.is_empty(), "user and password must not be empty");
    ensure!(!user.contains(':'), "a user name has no colon");
    let store = CredentialStore::of_user()?;
    let options = options(&arguments.registry)?;
    let repository = Repository::open_as(&reference, &user, &password, &options)?;
    repository.greet().with_context(|| format!("cannot log in to {domain}"))?;
    if store.put(domain, &user, &password)? {
        eprintln!(
            "cloche: the password is kept in {}, encoded only; a credential helper would protect it",
            store.path().display()
        );
    }
    println!("Logged in to {domain}");
    Ok(ExitCode::SUCCESS)
}

/// Forgets a registry.
pub fn logout(arguments: &Logout) -> anyhow::Result<ExitCode> {
    let reference = on(&arguments.server)?;
    let known = CredentialStore::of_user()?.remove(reference.domain())?;
    println!("{} {}", if known { "Logged out of" } else { "Not logged in to" }, reference.domain());
    Ok(ExitCode::SUCCESS)
}

/// Some image of a registry, which people also give as a URL, as Docker's own is known by one.
fn on(server: &str) -> anyhow::Result<Reference> {
    let host = server.trim_start_matches("https://").trim_start_matches("http://");
    let host = host.split('/').next().unwrap_or(host);
    let reference: Reference =
        format!("{host}/{NOWHERE}").parse().with_context(|| format!("{server:?} is no registry"))?;
    // What is no domain would be a part of a name on docker.io.
    if reference.domain() != host && host != "index.docker.io" {
        bail!("{server:?} is no registry; write its host, such as quay.io or localhost:5000");
    }
    Ok(reference)
}

fn ask_user() -> anyhow::Result<String> {
    ensure!(io::stdin().is_terminal(), "stdin is no terminal; give --username and --password-stdin");
    eprint!("Username: ");
    let mut user = String::new();
    io::stdin().lock().read_line(&mut user)?;
    Ok(user.trim().to_owned())
}

fn password_on_stdin() -> anyhow::Result<String> {
    let mut password = String::new();
    let read = io::stdin().lock().take(MAX_PASSWORD_BYTES).read_to_string(&mut password);
    read.context("cannot read the password on stdin")?;

    Ok(password.trim_end_matches(['\r', '\n']).to_owned())
}
