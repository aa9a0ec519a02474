//! Who and where the process is: user, environment, working directory, host name, process ids, descriptors.

use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::bed::{Bed, Loaded};
use crate::image::Image;
use crate::suite::{Body, Story, body};
use crate::tree::Tree;
use crate::world::{Isolation, Need};

pub const BODIES: &[Body] = &[
    body!(environment_holds_image_values_and_given_ones).rootless(),
    body!(working_directory_is_set_and_made).rootless(),
    body!(user_is_taken_by_name_and_number).rootless(),
    body!(image_defaults_apply_and_yield).rootless(),
    body!(entrypoint_of_the_image_gets_the_command_as_arguments).rootless(),
    body!(process_is_pid_1_and_sees_only_its_own).rootless(),
    body!(host_name_is_set).rootless(),
    body!(network_holds_only_a_loopback_that_works).rootless(),
    body!(no_descriptor_of_the_host_leaks).rootless(),
    body!(kernel_is_the_hosts_or_not).rootless(),
    body!(arguments_arrive_as_given).rootless(),
    body!(clock_is_the_hosts).rootless(),
    body!(random_numbers_differ_between_sandboxes).rootless(),
    body!(debian_runs_as_well).needs(&[Need::DebianImage]),
];

fn environment_holds_image_values_and_given_ones(bed: &Bed) -> Story {
    let finished = bed
        .busybox()
        .with("-e", "GREETING=good morning")
        .with("-e", "EMPTY=")
        .with("-e", "EQUALS=a=b")
        .command(&["env"])
        .run()?
        .succeeds()?;
    let out = finished.out();
    let has = |line: &str| out.lines().any(|known| known == line);
    ensure!(has("GREETING=good morning") && has("EMPTY=") && has("EQUALS=a=b"), "{finished}");
    ensure!(out.contains("PATH=/") && has("HOME=/root"), "PATH or HOME is missing\n{finished}");
    for host_only in ["CLOCHE_", "CARGO", "SUDO_", "SSH_", "OLDPWD"] {
        ensure!(!out.contains(host_only), "the host's environment leaks\n{finished}");
    }
    let overridden = bed.busybox().with("-e", "PATH=/nowhere:/bin").command(&["env"]).run()?.succeeds()?;
    ensure!(overridden.out().matches("PATH=").count() == 1, "PATH is there twice\n{overridden}");
    overridden.prints_some("PATH=/nowhere:/bin\n")?;
    Ok(())
}

fn working_directory_is_set_and_made(bed: &Bed) -> Story {
    bed.busybox().command(&["pwd"]).run()?.succeeds()?.prints("/\n")?;
    bed.busybox().with("-w", "/etc").command(&["pwd"]).run()?.succeeds()?.prints("/etc\n")?;
    // As Docker does, a missing directory is made.
    bed.busybox()
        .with("-w", "/made/for/this")
        .command(&["pwd"])
        .run()?
        .succeeds()?
        .prints("/made/for/this\n")?;
    Ok(())
}

fn user_is_taken_by_name_and_number(bed: &Bed) -> Story {
    let ids = "id -u; id -g; id -G";
    bed.busybox().sh(ids).run()?.succeeds()?.prints("0\n0\n0\n")?;
    let image = people(bed, json!({}))?;
    for (user, expected) in [
        // By name: the primary group of /etc/passwd and every group of /etc/group that lists the name.
        ("gardener", "1000\n1000\n1000 2000 2001\n"),
        ("1000", "1000\n1000\n1000 2000 2001\n"),
        ("gardener:tools", "1000\n2000\n2000\n"),
        ("1000:2000", "1000\n2000\n2000\n"),
        // A number needs no entry.
        ("4242:4343", "4242\n4343\n4343\n"),
        ("4242", "4242\n0\n0\n"),
        ("0", "0\n0\n0 2001\n"),
    ] {
        image.sandbox().with("-u", user).sh(ids).run()?.succeeds()?.prints(expected).context(user)?;
    }
    image.sandbox().with("-u", "gardener").sh("echo $HOME").run()?.succeeds()?.prints("/home/gardener\n")?;
    image.sandbox().with("-u", "stranger").sh(ids).run()?.refused_with(125)?.says("stranger")?;
    image.sandbox().with("-u", "gardener:strangers").sh(ids).run()?.refused_with(125)?.says("strangers")?;
    Ok(())
}

fn image_defaults_apply_and_yield(bed: &Bed) -> Story {
    let image = people(
        bed,
        json!({
            "User": "gardener:tools",
            "WorkingDir": "/home/gardener",
            "Env": ["PATH=/bin", "SEASON=spring"],
            "Cmd": ["sh", "-c", "id -u; id -g; pwd; echo $SEASON"],
        }),
    )?;
    image.sandbox().run()?.succeeds()?.prints("1000\n2000\n/home/gardener\nspring\n")?;
    image
        .sandbox()
        .with("-u", "0")
        .with("-w", "/etc")
        .with("-e", "SEASON=autumn")
        .sh("id -u; pwd; echo $SEASON")
        .run()?
        .succeeds()?
        .prints("0\n/etc\nautumn\n")?;
    Ok(())
}

fn entrypoint_of_the_image_gets_the_command_as_arguments(bed: &Bed) -> Story {
    let image =
        people(bed, json!({ "Env": ["PATH=/bin"], "Entrypoint": ["echo", "first"], "Cmd": ["default"] }))?;
    image.sandbox().run()?.succeeds()?.prints("first default\n")?;
    image.sandbox().command(&["given", "words"]).run()?.succeeds()?.prints("first given words\n")?;
    // A new entrypoint leaves the image's command behind, as in Docker.
    image.sandbox().with("--entrypoint", "pwd").run()?.succeeds()?.prints("/\n")?;
    image.sandbox().with("--entrypoint", "echo").command(&["x"]).run()?.succeeds()?.prints("x\n")?;
    Ok(())
}

fn process_is_pid_1_and_sees_only_its_own(bed: &Bed) -> Story {
    let script = "echo $$; cat /proc/1/comm; echo /proc/[0-9]*";
    bed.busybox().sh(script).run()?.succeeds()?.prints("1\nsh\n/proc/1\n")?;
    bed.busybox().command(&["cat", "/proc/self/comm"]).run()?.succeeds()?.prints("cat\n")?;
    Ok(())
}

fn host_name_is_set(bed: &Bed) -> Story {
    bed.busybox()
        .with("--hostname", "greenhouse")
        .command(&["hostname"])
        .run()?
        .succeeds()?
        .prints("greenhouse\n")?;
    let own = bed.busybox().command(&["hostname"]).run()?.succeeds()?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    ensure!(!own.out().trim().is_empty() && own.out() != host, "the host's own name shows\n{own}");
    Ok(())
}

fn network_holds_only_a_loopback_that_works(bed: &Bed) -> Story {
    bed.busybox().command(&["ls", "/sys/class/net"]).run()?.succeeds()?.prints("lo\n")?;
    bed.busybox().command(&["ping", "-c", "1", "-W", "20", "127.0.0.1"]).run()?.succeeds()?;
    Ok(())
}

fn no_descriptor_of_the_host_leaks(bed: &Bed) -> Story {
    // 3 is the directory that `ls` reads.
    bed.busybox().command(&["ls", "/proc/self/fd"]).run()?.succeeds()?.prints("0\n1\n2\n3\n")?;
    bed.busybox().input("x").command(&["ls", "/proc/self/fd"]).run()?.succeeds()?.prints("0\n1\n2\n3\n")?;
    Ok(())
}

fn kernel_is_the_hosts_or_not(bed: &Bed) -> Story {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let inside = bed.busybox().command(&["uname", "-r"]).run()?.succeeds()?;
    let same = inside.out() == host;
    ensure!(same == (bed.isolation() == Isolation::Container), "the host runs {host}\n{inside}");
    Ok(())
}

fn arguments_arrive_as_given(bed: &Bed) -> Story {
    let odd = [
        "",
        " ",
        "two words",
        "line\nbreak",
        "\"quoted\" 'twice'",
        "$HOME `id` \\",
        "größe ☂",
        "--",
        "-x",
        "\u{1}\u{7f}",
    ];
    let words = [&["printf", "[%s]\n"][..], &odd].concat();
    let expected: String = odd.iter().map(|word| format!("[{word}]\n")).collect();
    bed.busybox().command(&words).run()?.succeeds()?.prints(&expected)?;
    let long = "long ".repeat(20_000);
    let script = "echo ${#1} ${#LONG}";
    let finished = bed
        .busybox()
        .with("-e", &format!("LONG={long}"))
        .command(&["sh", "-c", script, "sh", &long])
        .run()?;
    finished.succeeds()?.prints("100000 100000\n")?;
    Ok(())
}

fn clock_is_the_hosts(bed: &Bed) -> Story {
    let now =
        || Ok::<u64, anyhow::Error>(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs());
    let before = now()?;
    let inside = bed.busybox().command(&["date", "+%s"]).run()?.succeeds()?;
    let after = now()?;
    let seconds: u64 = inside.out().trim().parse().context("date prints seconds")?;
    // A second for rounding at either end.
    ensure!((before - 1..=after + 1).contains(&seconds), "{before} before, {after} after\n{inside}");
    Ok(())
}

fn random_numbers_differ_between_sandboxes(bed: &Bed) -> Story {
    let script = "head -c 16 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid";
    let (one, two) =
        (bed.busybox().sh(script).run()?.succeeds()?, bed.busybox().sh(script).run()?.succeeds()?);
    ensure!(one.out().lines().all(|line| !two.out().contains(line)), "the same numbers twice\n{one}\n{two}");
    Ok(())
}

fn debian_runs_as_well(bed: &Bed) -> Story {
    let debian = bed.sandbox("debian");
    debian.clone().command(&["cat", "/etc/debian_version"]).run()?.succeeds()?.prints_some("12")?;
    debian.clone().command(&["bash", "-c", "echo ${BASH_VERSION%%.*}"]).run()?.succeeds()?.prints("5\n")?;
    let user = debian.clone().with("-u", "www-data").sh("id -un; touch /nope").run()?.exits_with(1)?;
    user.prints("www-data\n")?.says("Permission denied")?;
    debian.command(&["perl", "-e", "print 6 * 7"]).run()?.succeeds()?.prints("42")?;
    Ok(())
}

/// A busybox image with users and groups to tell apart.
fn people<'a>(bed: &'a Bed<'a>, config: serde_json::Value) -> Result<Loaded<'a>> {
    let mut tree = Tree::default();
    tree.directory("bin");
    tree.file("bin/busybox", bed.busybox_binary()?).mode = 0o755;
    for applet in ["sh", "id", "pwd", "echo", "env"] {
        tree.symlink(&format!("bin/{applet}"), "busybox");
    }
    tree.directory("etc");
    tree.file(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\ngardener:x:1000:1000::/home/gardener:/bin/sh\nbroken line\n",
    );
    tree.file(
        "etc/group",
        "root:x:0:\ngardener:x:1000:\ntools:x:2000:gardener\nkeys:x:2001:root,gardener\nshut:x:2002:other\n",
    );
    tree.directory("home");
    tree.directory("home/gardener").owner = (1000, 1000);
    tree.directory("root").mode = 0o700;
    let mut image = Image::new(vec![tree.to_layer()]);
    image.config = config;
    if image.config["Env"].is_null() {
        image.config["Env"] = json!(["PATH=/bin"]);
    }
    bed.generate("people", &image)
}
