//! `cloche build`: Dockerfiles that check themselves, under each isolation; and what is said of those that fail.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::crash::{init_below, vmm_below};
use crate::bed::Bed;
use crate::finished::Finished;
use crate::image::{gzip, sha256_hex};
use crate::process::{Input, Running};
use crate::suite::{Body, Story, body};
use crate::tar::{Archive, Header, kind};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(dockerfiles_of_run_build),
    body!(dockerfiles_of_copy_build),
    body!(dockerfiles_of_stages_and_metadata_build),
    body!(dockerfiles_of_mounts_and_changes_build),
    body!(failing_step_is_named_with_its_line).once(),
    body!(known_steps_are_not_repeated),
    body!(what_a_step_depends_on_decides_whether_it_is_repeated).only(Isolation::Container),
    body!(configuration_is_that_of_the_instructions).once(),
    body!(image_of_no_files_travels_and_starts),
    body!(context_comes_from_stdin).once(),
    body!(context_has_no_way_out).once(),
    body!(pruned_builder_gives_the_space_back).only(Isolation::Container),
    body!(files_are_added_from_urls).once(),
    body!(secrets_stay_nowhere_and_killed_build_leaves_nothing),
];

/// The time that reproducible images get.
const EPOCH: &str = "1700000000";

macro_rules! dockerfiles {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../dockerfiles/", $name, ".Dockerfile")))),*]
    };
}

type Dockerfiles = &'static [(&'static str, &'static str)];

const RUN: Dockerfiles =
    dockerfiles!["run-forms", "continuations", "variables", "user", "workdir", "shell", "network"];
const COPY: Dockerfiles = dockerfiles![
    "copy-files",
    "copy-directories",
    "copy-globs",
    "copy-owner",
    "copy-links-of-the-image",
    "copy-exclude",
    "copy-heredoc",
    "add",
];
const STAGES: Dockerfiles = dockerfiles![
    "copy-between-stages",
    "stages",
    "metadata",
    "scratch",
    "from-argument",
    "arguments-of-the-base",
    "entry-point",
    "on-build",
];
const MOUNTS: Dockerfiles = dockerfiles![
    "mount-cache",
    "mount-bind",
    "mount-tmpfs",
    "mount-secret",
    "changes",
    "large",
    "odd-names",
    "set-id",
];

/// A directory with something of everything.
fn context(bed: &Bed) -> Result<PathBuf> {
    let root = bed.scratch().join("context");
    let files: [(&str, &[u8]); 12] = [
        ("a.txt", b"a\n"),
        ("b.txt", b"b\n"),
        ("c.md", b"c\n"),
        ("odd name.txt", b"odd\n"),
        ("dir/one", b"1\n"),
        ("dir/sub/two", b"2\n"),
        ("dir/.hidden", b"h\n"),
        ("bin/tool", b"#!/bin/sh\necho tool\n"),
        ("ignored/secret", b"s\n"),
        ("keep.log", b""),
        ("drop.log", b""),
        (".dockerignore", b"ignored\n*.log\n!keep.log\n"),
    ];
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(path, content)?;
    }
    fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o755))?;
    symlink("one", root.join("dir/link"))?;
    let mut archive = Archive::default();
    archive.entry(Header { uid: 5, gid: 6, ..Header::new(kind::DIRECTORY, "in", 0o755) }, b"");
    archive.entry(Header { uid: 5, gid: 6, ..Header::new(kind::FILE, "in/x", 0o640) }, b"x\n");
    archive.entry(Header { link: "x".into(), ..Header::new(kind::SYMLINK, "in/y", 0o777) }, b"");
    fs::write(root.join("archive.tar.gz"), gzip(&archive.finish())?)?;
    fs::write(root.join("archive.tar.xz"), include_bytes!("../dockerfiles/archive.tar.xz"))?;
    fs::write(root.join("archive.tar.bz2"), include_bytes!("../dockerfiles/archive.tar.bz2"))?;
    Ok(root)
}

/// A bed with a store of its own, in which there is nothing but busybox.
fn own_store<'a>(bed: &Bed<'a>, name: &str) -> Result<Bed<'a>> {
    let own = bed.with_store(&bed.scratch().join(name))?;
    let archive = bed.scratch().join("busybox.tar");
    if !archive.exists() {
        bed.run(&["save", "-o", &archive.to_string_lossy(), "busybox"])?.succeeds()?;
    }
    own.load("busybox", &archive)?.succeeds()?;
    Ok(own)
}

/// Builds, by a text as Dockerfile.
fn build(bed: &Bed, isolation: Isolation, context: &Path, text: &str, more: &[&str]) -> Result<Finished> {
    let mut command = bed.cloche();
    command.args(["build", "--isolation", isolation.as_str(), "--progress=plain", "-f", "-"]);
    command.args(more).arg(context).env("SOURCE_DATE_EPOCH", EPOCH).env("CLOCHE_PULL", "never");
    Running::start(command, &Input::Bytes(text.as_bytes().to_vec()), bed.deadline())?.wait()
}

/// Builds all, under this bed's isolation and, in another store, in containers: the same images must come out.
fn build_all(bed: &Bed, dockerfiles: Dockerfiles) -> Story {
    let context = context(bed)?;
    let secret = bed.write("secret", b"s3cret")?;
    let secret = format!("id=token,src={}", secret.display());
    let (own, other) = (own_store(bed, "store")?, own_store(bed, "other")?);
    for (name, text) in dockerfiles {
        let ids = [(&own, bed.isolation()), (&other, Isolation::Container)].map(|(bed, isolation)| {
            let built = build(bed, isolation, &context, text, &["--secret", &secret, "-t", name])?;
            Ok::<_, anyhow::Error>(built.succeeds().with_context(|| format!("{name}.Dockerfile"))?.out())
        });
        let [id, other_id] = ids;
        let (id, other_id) = (id?, other_id?);
        ensure!(id == other_id, "{name}.Dockerfile gives {id} under {:?}, and {other_id}", bed.isolation());
    }
    Ok(())
}

fn dockerfiles_of_run_build(bed: &Bed) -> Story {
    build_all(bed, RUN)
}

fn dockerfiles_of_copy_build(bed: &Bed) -> Story {
    build_all(bed, COPY)
}

fn dockerfiles_of_stages_and_metadata_build(bed: &Bed) -> Story {
    build_all(bed, STAGES)
}

fn dockerfiles_of_mounts_and_changes_build(bed: &Bed) -> Story {
    build_all(bed, MOUNTS)
}

fn failing_step_is_named_with_its_line(bed: &Bed) -> Story {
    let (own, context) = (own_store(bed, "store")?, context(bed)?);
    // Its trigger names a stage that the Dockerfile has, and that nothing else there needs.
    let trap = "FROM busybox\nONBUILD COPY --from=other /bin/busybox /x\n";
    build(&own, Isolation::Container, &context, trap, &["-t", "trap"])?.succeeds()?;
    for (text, words) in [
        (
            "FROM busybox\n\nRUN echo said; exit 7\n",
            &["line 3: RUN echo said; exit 7", "exited with code 7", "said"][..],
        ),
        ("FROM busybox\nCOPY nothing /\n", &["line 2: COPY nothing /", "nothing is not in the context"]),
        ("FROM busybox\nCOPY ignored/secret /\n", &["line 2", ".dockerignore"]),
        ("FROM busybox\nRUN --network=host true\n", &["line 2", "--network=host is not supported"]),
        ("FROM busybox\nRUN --mount=type=ssh true\n", &["line 2", "type=ssh is not supported"]),
        ("FROM busybox\nADD https://example.com/x.git /\n", &["line 2", "Git"]),
        ("FROM busybox\nCOPY --chown=nosuch a.txt /\n", &["line 2", "no user nosuch"]),
        (
            "FROM busybox\nCOPY a.txt /bin\nCOPY a.txt /bin/sh/x\n",
            &["line 3", "/bin/busybox is there and is no directory"],
        ),
        (
            "FROM busybox\nRUN --mount=type=secret,id=none,required true\n",
            &["line 2", "secret none is required"],
        ),
        ("FROM --platform=linux/arm64 busybox\n", &["line 1", "linux/arm64"]),
        ("FROM nosuchimage\n", &["line 1", "there is no image nosuchimage"]),
        ("FROM scratch\nRUN true\n", &["line 2", "nothing to run"]),
        ("FROM busybox\nRUNN x\n", &["line 2", "RUN?"]),
        ("FROM busybox AS other\nFROM trap\n", &["line 2", "stage 0 of this file is not built"]),
        ("FROM busybox\nRUN truncate -s 1000G /sparse\n", &["line 2", "GiB"]),
        ("FROM busybox\nARG F=a.txt\nADD --checksum=sha256:0123 $F /\n", &["line 3", "a.txt is not"]),
        (
            "FROM busybox AS a\nRUN false\nFROM busybox\nCOPY --from=a /x /\nRUN sleep 100\n",
            &["line 2", "code 1"],
        ),
    ] {
        let mut failed = build(&own, Isolation::Container, &context, text, &[])?.exits_with(1)?;
        for word in words {
            failed = failed.says(word)?;
        }
    }
    Ok(())
}

fn known_steps_are_not_repeated(bed: &Bed) -> Story {
    let own = own_store(bed, "store")?;
    let context = context(bed)?;
    let text = "FROM busybox\nCOPY . /all/\nRUN cat /proc/sys/kernel/random/uuid > /uuid\nENV A=1\n";
    let first = build(&own, bed.isolation(), &context, text, &[])?.succeeds()?.out();
    // What files were last written says nothing of what is in them.
    fs::write(context.join("a.txt"), "a\n")?;
    let again = build(&own, bed.isolation(), &context, text, &[])?.succeeds()?.says("cached")?;
    ensure!(again.out() == first, "the second build gives another image\n{again}");
    let anew = build(&own, bed.isolation(), &context, text, &["--no-cache"])?.succeeds()?;
    ensure!(anew.out() != first, "--no-cache gave the random number of the first build\n{anew}");
    Ok(())
}

fn what_a_step_depends_on_decides_whether_it_is_repeated(bed: &Bed) -> Story {
    let own = own_store(bed, "store")?;
    let context = context(bed)?;
    let text =
        "FROM busybox\nARG V=1\nCOPY a.txt /\nRUN cat /proc/sys/kernel/random/uuid > /uuid\nARG LATE\n";
    let id = |more: &[&str]| -> Result<String> {
        Ok(build(&own, Isolation::Container, &context, text, more)?.succeeds()?.out())
    };
    let first = id(&[])?;
    ensure!(
        id(&["--build-arg", "HTTP_PROXY=http://x"])? == first,
        "a proxy is nothing that a result depends on"
    );
    let other = id(&["--build-arg", "V=2"])?;
    ensure!(other != first, "an argument in force was not looked at");
    fs::write(context.join("b.txt"), "changed\n")?;
    ensure!(id(&[])? == first, "a file that nobody copies was looked at");
    fs::write(context.join("a.txt"), "changed\n")?;
    let changed = id(&[])?;
    ensure!(changed != first, "a file's new content was not seen");
    fs::set_permissions(context.join("a.txt"), fs::Permissions::from_mode(0o600))?;
    ensure!(id(&[])? != changed, "a file's new mode was not seen");
    Ok(())
}

fn configuration_is_that_of_the_instructions(bed: &Bed) -> Story {
    let context = context(bed)?;
    let own = own_store(bed, "store")?;
    let inspect = |name: &str, more: &[&str]| -> Result<serde_json::Value> {
        let text = STAGES.iter().find(|(known, _)| *known == name).context("there is such a Dockerfile")?.1;
        let more = [&["-t", name, "-t", "second:name"][..], more].concat();
        build(&own, Isolation::Container, &context, text, &more)?.succeeds()?;
        Ok(own.json(&["image", "inspect", name])?[0].clone())
    };
    let made = inspect("metadata", &["--label", "more=label"])?;
    ensure!(made["RepoTags"] == json!(["metadata:latest", "second:name"]), "{made:#}");
    let labels =
        json!({"one": "1", "two words": "with blanks", "three": "3", "four": "4 4", "more": "label"});
    let ports = json!({"80/tcp": {}, "443/tcp": {}, "53/udp": {}, "8000/tcp": {}, "8001/tcp": {}});
    let check = json!({
        "Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000u64, "Timeout": 3_000_000_000u64, "Retries": 2,
    });
    for (field, expected) in [
        ("Labels", labels),
        ("ExposedPorts", ports),
        ("Volumes", json!({"/data": {}, "/more": {}, "/with blank": {}})),
        ("StopSignal", json!("SIGUSR1")),
        ("Healthcheck", check),
        ("User", json!("daemon:daemon")),
        ("WorkingDir", json!("/srv/rel")),
        ("Cmd", json!(["sleep", "1"])),
        ("Entrypoint", json!(["/bin/sh", "-c"])),
        ("OnBuild", json!(["RUN true"])),
        ("Shell", json!(["/bin/busybox", "sh", "-ec"])),
    ] {
        ensure!(
            made["Config"][field] == expected,
            "{field} is {}, expected was {expected}",
            made["Config"][field]
        );
    }
    ensure!(made["Author"] == "Somebody" && made["Created"] == "2023-11-14T22:13:20Z", "{made:#}");
    // A command of the base was for its entry point.
    let made = inspect("entry-point", &[])?;
    ensure!(made["Config"]["Cmd"].is_null() && made["Config"]["Entrypoint"] == json!(["second"]), "{made:#}");
    let made = inspect("scratch", &[])?;
    ensure!(made["Config"]["Cmd"] == json!(["/none"]), "{made:#}");
    let history = own.run(&["history", "--no-trunc", "scratch"])?.succeeds()?.out();
    ensure!(history.contains("COPY dir /d") && history.contains("ENV X=1"), "{history}");
    let history = own.run(&["history", "--no-trunc", "metadata"])?.succeeds()?.out();
    ensure!(history.contains("HEALTHCHECK --interval=5s --timeout=3s --retries=2 CMD true"), "{history}");
    Ok(())
}

fn image_of_no_files_travels_and_starts(bed: &Bed) -> Story {
    let (context, own) = (context(bed)?, own_store(bed, "store")?);
    let id = build(
        &own,
        bed.isolation(),
        &context,
        "FROM scratch\nLABEL a=b\nCMD [\"/none\"]\n",
        &["-t", "none"],
    )?;
    let id = id.succeeds()?.out();
    let archive = bed.scratch().join("none.tar");
    own.run(&["save", "-o", &archive.to_string_lossy(), "none"])?.succeeds()?;
    let other = bed.with_store(&bed.scratch().join("other"))?;
    other.load("none", &archive)?.succeeds()?;
    let told = other.json(&["image", "inspect", "none"])?;
    ensure!(told[0]["Id"] == id.trim(), "{told:#} is not {id}");
    // There is a root, and nothing in it.
    other.sandbox("none").run()?.exits_with(127)?.says("/none")?;
    let tool = bed.write("tool", bed.busybox_binary()?)?;
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755))?;
    let mount = format!("{}:/busybox:ro", tool.display());
    let listed = other.sandbox("none").with("-v", &mount).command(&["/busybox", "ls", "/"]).run()?;
    listed.succeeds()?.prints("busybox\ndev\nproc\nsys\n")?;
    Ok(())
}

fn context_comes_from_stdin(bed: &Bed) -> Story {
    let feed = |bytes: Vec<u8>, more: &[&str]| -> Result<Finished> {
        let mut command = bed.cloche();
        command.args(["build", "--isolation", "container", "-t", "fed"]).args(more).arg("-");
        Running::start(command, &Input::Bytes(bytes), bed.deadline())?.wait()
    };
    let mut archive = Archive::default();
    archive.file("d/other", b"FROM busybox\nCOPY d /copied\nRUN [ \"$(cat /copied/f)\" = content ]\n");
    archive.file("d/f", b"content\n");
    archive.file("Dockerfile", b"FROM busybox\nRUN false\n");
    let archive = archive.finish();
    feed(archive.clone(), &["-f", "d/other"])?.succeeds()?;
    feed(gzip(&archive)?, &["-f", "d/other"])?.succeeds()?;
    feed(archive, &[])?.exits_with(1)?.says("line 2: RUN false")?;
    feed(b"FROM busybox\nRUN true\n".to_vec(), &[])?.succeeds()?;
    feed(b"FROM busybox\nCOPY x /\n".to_vec(), &[])?.exits_with(1)?.says("x is not in the context")?;
    bed.run(&["rmi", "fed"])?.succeeds()?;
    Ok(())
}

fn context_has_no_way_out(bed: &Bed) -> Story {
    let context = bed.scratch().join("context");
    fs::create_dir(&context)?;
    bed.write("outside", b"outside\n")?;
    symlink("../outside", context.join("relative"))?;
    symlink(bed.scratch().join("outside"), context.join("absolute"))?;
    symlink("..", context.join("up"))?;
    for source in ["../outside", "relative", "absolute", "up/outside"] {
        let text = format!("FROM busybox\nCOPY {source} /x\n");
        build(bed, Isolation::Container, &context, &text, &[])?
            .exits_with(1)?
            .says("is not in the context")?;
    }
    // An image's links stay in it, whichever side of a COPY they are on.
    let own = own_store(bed, "store")?;
    let mark = bed.scratch().join("mark").display().to_string();
    let text = format!(
        "FROM busybox AS hostile\nRUN ln -s ../../../../../.. /up && ln -s {mark} /file && ln -s / /root-link\n\
         FROM hostile\nCOPY <<EOF /file\ntext\nEOF\nCOPY <<EOF /up/made\ntext\nEOF\nCOPY --from=hostile /up/etc/passwd /p\n\
         RUN [ -f {mark} ] && [ -f /made ] && grep -q nobody:x /p\n"
    );
    build(&own, Isolation::Container, &context, &text, &[])?.succeeds()?;
    ensure!(!Path::new(&mark).exists(), "a COPY wrote to a file of this machine");
    Ok(())
}

fn pruned_builder_gives_the_space_back(bed: &Bed) -> Story {
    let own = own_store(bed, "store")?;
    let context = context(bed)?;
    let before = own.store_listing()?;
    let text = "FROM busybox\nRUN --mount=type=cache,target=/c echo x > /made; echo y > /c/y\n";
    build(&own, Isolation::Container, &context, text, &["-t", "made"])?.succeeds()?;
    own.run(&["rmi", "made"])?.succeeds()?;
    // What it has made is still known.
    build(&own, Isolation::Container, &context, text, &["-t", "made"])?.succeeds()?.says("cached")?;
    let usage = own.json(&["system", "df", "--json"])?;
    let row = |kind: &str| -> Result<&serde_json::Value> {
        let rows = usage.as_array().into_iter().flatten();
        rows.clone().find(|row| row["kind"] == kind).with_context(|| format!("no row {kind} in {usage:#}"))
    };
    ensure!(row("steps of builds")?["count"] == 1 && row("caches of RUN")?["count"] == 1, "{usage:#}");
    own.run(&["rmi", "made"])?.succeeds()?;
    own.run(&["builder", "prune"])?.succeeds()?.prints_some("1 steps, 1 caches")?;
    let after: Vec<String> =
        own.store_listing()?.into_iter().filter(|path| !path.contains("build-mounts")).collect();
    let left: Vec<&String> =
        after.iter().filter(|path| !before.contains(path) && !path.ends_with("/steps")).collect();
    ensure!(left.is_empty(), "left are {left:?}");
    Ok(())
}

/// A web server of these files, until the test program ends. Returns its address.
fn serve(files: Vec<(&'static str, Vec<u8>)>) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut head =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let line = head.next().unwrap_or_default();
            // A client that goes away is its own business.
            let _ = head.count();
            let path = line.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default();
            let file = files.iter().find(|(name, _)| *name == path).map(|(_, content)| content.as_slice());
            let status = if file.is_some() { "200 OK" } else { "404 Not Found" };
            let content = file.unwrap_or_default();
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
                 Connection: close\r\n\r\n",
                content.len()
            );
            let _ = stream.write_all(&[head.as_bytes(), content].concat());
        }
    });
    Ok(address)
}

fn files_are_added_from_urls(bed: &Bed) -> Story {
    let (own, context) = (own_store(bed, "store")?, context(bed)?);
    let archive = fs::read(context.join("archive.tar.gz"))?;
    let digest = sha256_hex(b"from afar\n");
    let host = serve(vec![("/dir/file.txt", b"from afar\n".to_vec()), ("/a.tar.gz", archive)])?;
    let url = format!("http://{host}/dir/file.txt");
    let text = format!(
        "FROM busybox\n\
         ADD {url} /into/\n\
         ADD --checksum=sha256:{digest} --chmod=755 --chown=5:6 {url}?a=b /named\n\
         ADD http://{host}/a.tar.gz /kept.tar.gz\n\
         ADD --unpack=true http://{host}/a.tar.gz /unpacked/\n\
         RUN [ \"$(cat /into/file.txt /named | sort -u)\" = 'from afar' ] && [ \"$(stat -c '%a %u:%g' /named)\" = '755 5:6' ] \
         && [ \"$(stat -c '%a %Y' /into/file.txt)\" = '600 784111777' ] && gunzip -t /kept.tar.gz && [ -f /unpacked/in/x ]\n"
    );
    build(&own, Isolation::Container, &context, &text, &[])?.succeeds()?;
    build(&own, Isolation::Container, &context, &text, &[])?.succeeds()?.says("CACHED")?;
    for (line, words) in [
        (
            format!("ADD --checksum=sha256:{} {url} /", "0".repeat(64)),
            &["line 2", digest.as_str(), "expected"][..],
        ),
        (format!("ADD http://{host}/missing /"), &["line 2", "404"]),
        (format!("ADD http://{host}/ /"), &["line 2"]),
        ("ADD http://registry.test/x /".to_owned(), &["line 2", "not encrypted"]),
        ("ADD ftp://127.0.0.1/x /".to_owned(), &["line 2", "not supported"]),
        (format!("COPY {url} /"), &["line 2", "ADD takes URLs"]),
    ] {
        let text = format!("FROM busybox\n{line}\n");
        let mut failed = build(&own, Isolation::Container, &context, &text, &[])?.exits_with(1)?;
        for word in words {
            failed = failed.says(word)?;
        }
    }
    Ok(())
}

/// Whether a file below has these bytes in it.
fn holds(directory: &Path, bytes: &[u8]) -> Result<bool> {
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else if fs::read(entry.path())?.windows(bytes.len()).any(|piece| piece == bytes) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn secrets_stay_nowhere_and_killed_build_leaves_nothing(bed: &Bed) -> Story {
    let (own, context) = (own_store(bed, "store")?, context(bed)?);
    let secret = b"a secret that is nowhere else";
    let option = format!("id=token,src={}", bed.write("secret", secret)?.display());
    let state = own.scratch().join("state");
    let mounts = "--mount=type=secret,id=token --mount=type=secret,id=token,env=TOKEN";
    let text = format!(
        "FROM busybox\nRUN {mounts} [ \"$(cat /run/secrets/token)\" = \"$TOKEN\" ] && echo > /made\n"
    );
    let more = ["--secret", option.as_str(), "-t", "made"];
    build(&own, bed.isolation(), &context, &text, &more)?.succeeds()?;
    ensure!(!holds(own.store_root(), secret)? && !holds(&state, secret)?, "the secret is kept somewhere");

    let before = own.store_listing()?;
    let text = format!("FROM busybox\nRUN {mounts} echo > /made; sleep 100000\n");
    let mut command = own.cloche();
    command.args(["build", "--isolation", bed.isolation().as_str(), "--progress=plain", "-f", "-"]);
    command.args(more).arg(&context);
    let mut running = Running::start(command, &Input::Bytes(text.into_bytes()), bed.deadline())?;
    match bed.isolation() {
        Isolation::Vm => running.wait_for("the step's VMM", vmm_below)?,
        _ => running.wait_for("the step's container", init_below)?,
    };
    ensure!(holds(&state, secret)?, "the step has no secret, so that nothing is tested here");
    running.signal(Signal::KILL)?;
    running.wait()?.exits_with(137)?;
    own.run(&["ps"])?.succeeds()?;
    ensure!(!holds(&state, secret)? && !holds(own.store_root(), secret)?, "the secret outlived the build");
    own.is_clean()?;
    own.run(&["image", "prune"])?.succeeds()?;
    let after = own.store_listing()?;
    ensure!(before == after, "the killed build left something in the store:\n{before:#?}\n{after:#?}");
    build(&own, bed.isolation(), &context, "FROM busybox\nRUN echo > /made\n", &[])?.succeeds()?;
    Ok(())
}
