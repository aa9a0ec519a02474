//! `cloche commit`, and what else reads what a sandbox has written, from outside of it.

use anyhow::ensure;

use crate::bed::Bed;
use crate::suite::{Body, Story, body};

pub const BODIES: &[Body] = &[
    body!(running_sandbox_is_committed),
    body!(ended_sandbox_is_committed),
    body!(sandbox_that_was_removed_cannot_be_committed),
    body!(changes_are_listed_and_the_root_is_exported),
];

/// Writes what layers can hold, and what they must get right.
const WORK: &str = "mkdir -p /made/deep; echo one >/made/deep/file; ln /made/deep/file /made/again
    chown 12:34 /made/deep/file; chmod 4755 /made/deep/file; ln -s deep /made/link; touch -d @1000000000 /made/deep
    rm /etc/group; rm -r /tmp; mkdir /tmp; echo x >/tmp/x; mknod /made/pipe p; mknod /made/null c 1 3
    dd if=/dev/zero of=/made/sparse bs=1 count=1 seek=20000000 2>/dev/null; mv /etc/passwd /made/moved
    printf 'x' >\"$(printf '/made/\\377')\"";

/// Shows it.
const LOOK: &str = "cd /made; stat -c '%n %F %a %u:%g %h' * deep/file; wc -c sparse; stat -c %Y deep; readlink link
    cat again /tmp/x; ls /etc/group /etc/passwd 2>&1; stat -c '%t,%T' null; wc -c <moved; ls -d /dev /proc /sys";

fn look(bed: &Bed, image: &str) -> anyhow::Result<String> {
    let seen = bed.sandbox(image).sh(LOOK).run()?;
    let seen = seen.succeeds()?;
    Ok(String::from_utf8_lossy(&seen.stdout).into_owned())
}

fn running_sandbox_is_committed(bed: &Bed) -> Story {
    let script = format!("{WORK}; ({LOOK}); echo ready; read line");
    let mut running = bed.busybox().with("--name", "work").held_input().sh(&script).start()?;
    running.wait_for_stdout("ready\n")?;
    bed.run(&["commit", "-c", "ENV KEPT=yes", "-m", "a remark", "work", "committed:v1"])?.succeeds()?;
    // It was stopped meanwhile, and goes on.
    running.write(b"\n")?;
    let finished = running.wait()?.succeeds()?;
    let expected = String::from_utf8_lossy(&finished.stdout).replace("ready\n", "");
    let seen = look(bed, "committed:v1")?;
    ensure!(seen == expected, "the sandbox saw\n{expected}\nbut the image has\n{seen}");
    bed.sandbox("committed:v1").sh("echo $KEPT").run()?.prints("yes\n")?;
    bed.run(&["history", "committed:v1"])?.succeeds()?.prints_some("a remark")?;
    bed.run(&["image", "rm", "committed:v1"])?.succeeds()?;
    Ok(())
}

fn ended_sandbox_is_committed(bed: &Bed) -> Story {
    bed.keeps_records();
    let ended = bed.busybox().kept("done").sh(&format!("{WORK}; {LOOK}; exit 3")).run()?;
    ensure!(ended.code() == 3, "{ended}");
    let expected = String::from_utf8_lossy(&ended.stdout).into_owned();
    bed.run(&["commit", "done", "committed:v2"])?.succeeds()?;
    let seen = look(bed, "committed:v2")?;
    ensure!(seen == expected, "the sandbox saw\n{expected}\nbut the image has\n{seen}");
    bed.run(&["rm", "done"])?.succeeds()?;
    bed.run(&["image", "rm", "committed:v2"])?.succeeds()?;
    Ok(())
}

fn sandbox_that_was_removed_cannot_be_committed(bed: &Bed) -> Story {
    bed.busybox().with("--name", "gone").command(&["true"]).run()?.succeeds()?;
    bed.run(&["commit", "gone"])?.refused()?.says("gone")?;
    Ok(())
}

fn changes_are_listed_and_the_root_is_exported(bed: &Bed) -> Story {
    let script = "rm /etc/group; echo x >>/etc/passwd; mkdir -p /new/dir; echo kept >/new/dir/file
        chmod 4711 /new/dir/file; ln -s dir /new/link; touch \"$(printf '/new/\\033')\"; echo ready; read line";
    let mut running = bed.busybox().with("--name", "work").held_input().sh(script).start()?;
    running.wait_for_stdout("ready\n")?;
    bed.run(&["diff", "work"])?.succeeds()?.prints(
        "C /etc\nD /etc/group\nC /etc/passwd\nA /new\nA /new/\\u{1b}\nA /new/dir\nA /new/dir/file\nA /new/link\n",
    )?;
    let archive = bed.scratch().join("root.tar").to_string_lossy().into_owned();
    bed.run(&["export", "--output", &archive, "work"])?.succeeds()?;
    running.write(b"\n")?;
    running.wait()?.succeeds()?;
    bed.run(&["import", "-c", "CMD [\"sh\"]", &archive, "flat"])?.succeeds()?;
    let look = "stat -c '%a %u' /new/dir/file; cat /new/link/file; tail -n 1 /etc/passwd; ls /etc/group 2>&1; ls -d /bin";
    let seen = bed.sandbox("flat").sh(look).run()?;
    seen.prints("4711 0\nkept\nx\nls: /etc/group: No such file or directory\n/bin\n")?;
    bed.run(&["image", "rm", "flat"])?.succeeds()?;
    Ok(())
}
