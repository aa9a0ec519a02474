//! `cloche pull`, `push`, `login` and what `run` does with an image that is not here.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::ensure;

use super::rootfs::base;
use crate::bed::Bed;
use crate::image::{Image, Layering, Layout, gzip};
use crate::process::{Input, Running};
use crate::registry::Registry;
use crate::suite::{Body, Story, body};

const INSECURE: &str = "--tls-verify=false";
/// `me:opensesame`
const BASIC: &str = "Basic bWU6b3BlbnNlc2FtZQ==";

pub const BODIES: &[Body] = &[
    body!(missing_image_is_pulled_and_runs),
    body!(image_is_pulled_when_it_is_asked_for),
    body!(pushed_image_is_pulled_elsewhere_and_runs),
    body!(registry_without_tls_is_spoken_with_only_when_asked_for).once(),
    body!(login_is_kept_and_used_until_logout).once(),
    body!(credential_helper_is_asked).once(),
    body!(saved_image_is_loaded_elsewhere_and_runs),
    body!(imported_file_system_runs_as_its_changes_say),
    body!(images_are_told_of_in_tables).once(),
];

fn layout(bed: &Bed, greeting: &str) -> anyhow::Result<Layout> {
    let mut tree = base(bed)?;
    tree.file("greeting", greeting);
    Image::new(vec![tree.to_layer()]).to_oci_layout("latest", Layering::Gzip)
}

fn missing_image_is_pulled_and_runs(bed: &Bed) -> Story {
    let registry = Registry::start(None)?;
    registry.put("1", &layout(bed, "from afar\n")?)?;
    let image = registry.image("app:1");
    let bed = bed.with_empty_store()?;
    let run = || bed.sandbox(&image).option(INSECURE).command(&["cat", "/greeting"]);
    run().option("--pull=never").run()?.refused_with(125)?.says("app:1")?;
    ensure!(registry.count("GET") == 0, "a registry was asked though it was not to be");
    run().option("--pull=missing").run()?.succeeds()?.prints("from afar\n")?;
    let asked = registry.count("GET");
    run().option("--pull=missing").run()?.succeeds()?.prints("from afar\n")?;
    ensure!(registry.count("GET") == asked, "an image that is here was asked for");
    let unknown = bed.sandbox(&registry.image("app:2"));
    unknown.option(INSECURE).option("--pull=missing").run()?.refused_with(125)?.says("app:2")?;
    Ok(())
}

fn image_is_pulled_when_it_is_asked_for(bed: &Bed) -> Story {
    let registry = Registry::start(None)?;
    let image = registry.image("app:1");
    let store = bed.with_empty_store()?;
    for greeting in ["one\n", "two\n"] {
        registry.put("1", &layout(bed, greeting)?)?;
        let sandbox = store.sandbox(&image).option(INSECURE).option("--pull=always");
        sandbox.command(&["cat", "/greeting"]).run()?.succeeds()?.prints(greeting)?;
    }
    Ok(())
}

fn pushed_image_is_pulled_elsewhere_and_runs(bed: &Bed) -> Story {
    let registry = Registry::start(None)?;
    let image = registry.image("app:1");
    let mut tree = base(bed)?;
    tree.file("greeting", "there and back\n");
    let bed = bed.with_empty_store()?;
    let archive = Image::new(vec![tree.to_layer()]).to_docker_archive("app");
    bed.load("app", &bed.write("a.tar", &archive)?)?.succeeds()?;
    bed.run(&["tag", "app", &image])?.succeeds()?;
    let pushed = bed.run(&["push", INSECURE, "-q", &image])?.succeeds()?.out();
    ensure!(registry.count("PUT /v2/app/blobs") == 2, "a layer and a configuration are put once each");
    ensure!(bed.run(&["push", INSECURE, "-q", &image])?.succeeds()?.out() == pushed, "another digest");
    ensure!(registry.count("PUT /v2/app/blobs") == 2, "blobs that were there travelled again");
    let other = bed.with_store(&bed.scratch().join("other"))?;
    other.run(&["pull", INSECURE, "-q", &image])?.succeeds()?.prints(&pushed)?;
    other.sandbox(&image).command(&["cat", "/greeting"]).run()?.succeeds()?.prints("there and back\n")?;
    let by_digest = format!("{}@{}", registry.image("app"), pushed.trim());
    other.sandbox(&by_digest).command(&["cat", "/greeting"]).run()?.succeeds()?.prints("there and back\n")?;
    Ok(())
}

fn registry_without_tls_is_spoken_with_only_when_asked_for(bed: &Bed) -> Story {
    let registry = Registry::start(None)?;
    registry.put("1", &layout(bed, "")?)?;
    let bed = bed.with_empty_store()?;
    bed.run(&["pull", &registry.image("app:1")])?.refused()?.says(INSECURE)?;
    ensure!(registry.count("GET") == 0, "plain HTTP was spoken unasked");
    Ok(())
}

/// `cloche` with Docker's configuration in the bed.
fn with_config(bed: &Bed, words: &[&str]) -> Command {
    let mut command = bed.cloche();
    command.env("DOCKER_CONFIG", bed.scratch().join("docker")).args(words);
    command
}

fn login_is_kept_and_used_until_logout(bed: &Bed) -> Story {
    let registry = Registry::start(Some(BASIC))?;
    registry.put("1", &layout(bed, "")?)?;
    let (host, image) = (registry.host(), registry.image("app:1"));
    let bed = bed.with_empty_store()?;
    let run = |words: &[&str], input: &str| {
        let input = Input::Bytes(input.as_bytes().to_vec());
        Running::start(with_config(&bed, words), &input, bed.deadline())?.wait()
    };
    run(&["pull", INSECURE, &image], "")?.refused()?.says("cloche login")?;
    let login = ["login", INSECURE, "-u", "me", "--password-stdin", &host];
    run(&login, "wrong\n")?.refused()?.says("refuses your credentials")?;
    run(&login, "opensesame\n")?.succeeds()?.prints_some("Logged in")?;
    run(&["pull", INSECURE, &image], "")?.succeeds()?;
    run(&["logout", &host], "")?.succeeds()?;
    run(&["pull", INSECURE, &image], "")?.refused()?.says("cloche login")?;
    run(&["login", "no/registry/but/a/path"], "")?.refused()?.says("is no registry")?;
    Ok(())
}

fn credential_helper_is_asked(bed: &Bed) -> Story {
    let registry = Registry::start(Some(BASIC))?;
    registry.put("1", &layout(bed, "")?)?;
    let bed = bed.with_empty_store()?;
    let helper = bed.write(
        "docker-credential-test",
        format!(
            "#!/bin/sh\nread host\n[ \"$1 $host\" = 'get {}' ] || {{ echo 'credentials not found'; exit 1; }}\n\
             echo '{{\"Username\":\"me\",\"Secret\":\"opensesame\"}}'\n",
            registry.host()
        )
        .as_bytes(),
    )?;
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755))?;
    std::fs::create_dir_all(bed.scratch().join("docker"))?;
    bed.write("docker/config.json", br#"{"credsStore":"test"}"#)?;
    let mut command = with_config(&bed, &["pull", INSECURE, &registry.image("app:1")]);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", bed.scratch().display()));
    Running::start(command, &Input::Null, bed.deadline())?.wait()?.succeeds()?;
    let missing = with_config(&bed, &["pull", INSECURE, &registry.image("app:1")]);
    let said = Running::start(missing, &Input::Null, bed.deadline())?.wait()?.refused()?;
    said.says("docker-credential-test")?;
    Ok(())
}

fn saved_image_is_loaded_elsewhere_and_runs(bed: &Bed) -> Story {
    let archive = bed.write("in.tar", &layout(bed, "saved\n")?.to_tar())?;
    let bed = bed.with_empty_store()?;
    bed.load("keep", &archive)?.succeeds()?;
    let saved = bed.run(&["save", "keep"])?.succeeds()?.stdout;
    let other = bed.with_store(&bed.scratch().join("other"))?;
    other.start(&["load"], &Input::Bytes(saved.clone()))?.wait()?.succeeds()?.prints_some("keep:latest")?;
    other.sandbox("keep").command(&["cat", "/greeting"]).run()?.succeeds()?.prints("saved\n")?;
    let file = bed.scratch().join("out.tar").to_string_lossy().into_owned();
    bed.run(&["save", "-o", &file, "keep"])?.succeeds()?;
    ensure!(std::fs::read(&file)? == saved, "a file and stdout get different archives");
    bed.run(&["save", "-o", &file, "unknown"])?.refused()?.says("unknown")?;
    ensure!(std::fs::read(&file)? == saved, "a save that failed has touched the file");
    Ok(())
}

fn imported_file_system_runs_as_its_changes_say(bed: &Bed) -> Story {
    let mut tree = base(bed)?;
    tree.file("greeting", "imported\n");
    let archive = gzip(&tree.to_layer())?;
    let bed = bed.with_empty_store()?;
    let changes = [
        "-c",
        r#"CMD ["cat", "/greeting"]"#,
        "-c",
        "ENV PATH=/bin:/usr/bin A='one two'",
        "-c",
        "WORKDIR /etc",
    ];
    let words = [&["import", "-m", "by a test"], &changes[..], &["-", "made"]].concat();
    bed.start(&words, &Input::Bytes(archive.clone()))?.wait()?.succeeds()?.prints_some("sha256:")?;
    bed.sandbox("made").run()?.succeeds()?.prints("imported\n")?;
    bed.sandbox("made").sh("echo $A; pwd").run()?.succeeds()?.prints("one two\n/etc\n")?;
    bed.run(&["history", "made"])?.succeeds()?.prints_some("by a test")?;
    bed.run(&["image", "verify", "made"])?.succeeds()?;
    bed.run(&["import", "-c", "RUN x", "-", "bad"])?.refused()?.says("no change")?;
    bed.start(&["import", "-", "bad"], &Input::Bytes(b"no archive".repeat(100)))?.wait()?.refused()?;
    ensure!(bed.image_names()?.iter().all(|name| name.contains("made")), "an image of nothing");
    Ok(())
}

fn images_are_told_of_in_tables(bed: &Bed) -> Story {
    let archive = bed.write("in.tar", &layout(bed, "x")?.to_tar())?;
    let bed = bed.with_empty_store()?;
    bed.load("one", &archive)?.succeeds()?;
    bed.run(&["tag", "one", "two:v2"])?.succeeds()?;
    bed.run(&["images"])?.succeeds()?.prints_some("two:v2")?;
    bed.run(&["image", "verify"])?.succeeds()?.prints_some("whole")?;
    let layers = bed.json(&["image", "layers", "--json", "one"])?;
    ensure!(layers[0]["added"].as_u64().is_some_and(|added| added > 0), "layers without files: {layers}");
    let page = bed.scratch().join("layers.html");
    bed.run(&["image", "layers", "--html", &page.to_string_lossy(), "one"])?
        .succeeds()?
        .prints_some("WASTED")?;
    ensure!(std::fs::read_to_string(page)?.contains("<svg"), "no picture");
    ensure!(
        bed.json(&["history", "--json", "one"])?.as_array().is_some_and(|steps| steps.len() == 1),
        "one step"
    );
    let usage = bed.json(&["system", "df", "--json"])?;
    ensure!(usage[0]["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "images take no space: {usage}");
    bed.run(&["rmi", "one"])?.succeeds()?;
    bed.run(&["image", "prune"])?.succeeds()?.prints_some("Freed")?;
    bed.run(&["image", "inspect", "two:v2"])?.succeeds()?;
    bed.run(&["image", "prune", "-a"])?.succeeds()?.prints_some("Deleted: sha256:")?;
    ensure!(bed.image_names()?.is_empty(), "images are left");
    Ok(())
}
