//! Requests that cannot be carried out: refused with a message that helps, and nothing left behind.

use anyhow::{Context as _, ensure};

use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::{Isolation, Need};

pub const BODIES: &[Body] = &[
    body!(unknown_options_are_usage_errors),
    body!(unknown_image_names_the_command_that_loads_one),
    body!(relative_working_directory_is_refused),
    body!(mistaken_values_are_refused),
    body!(command_without_anything_to_run_is_refused),
    body!(unusable_state_directory_is_named),
    body!(kernel_for_a_container_is_refused).only(Isolation::Container),
    body!(missing_kernel_is_named).only(Isolation::Vm),
    body!(kernel_that_is_none_is_refused).only(Isolation::Vm),
    body!(torn_kernel_is_refused).only(Isolation::Vm),
    body!(kernel_without_drivers_names_them).only(Isolation::Vm).needs(&[Need::CloudKernel]),
    body!(default_isolation_without_kvm_fails_closed).once().needs(&[Need::NoUsableKvm]),
];

fn unknown_options_are_usage_errors(bed: &Bed) -> Story {
    bed.busybox()
        .option("--no-such-option")
        .command(&["true"])
        .run()?
        .refused_with(2)?
        .says("--no-such-option")?;
    bed.run(&["no-such-command"])?.refused_with(2)?.says("no-such-command")?;
    bed.busybox().isolation(Some("jar")).command(&["true"]).run()?.refused_with(2)?.says("jar")?;
    bed.run(&["run"])?.refused_with(2)?;
    // Options after the image are the command's own.
    bed.busybox()
        .command(&["echo", "--isolation", "--no-such-option"])
        .run()?
        .succeeds()?
        .prints("--isolation --no-such-option\n")?;
    Ok(())
}

fn unknown_image_names_the_command_that_loads_one(bed: &Bed) -> Story {
    let finished = bed.sandbox("no-such-image").command(&["true"]).run()?;
    finished.refused_with(125)?.says("no-such-image")?.says("`cloche pull`")?.says("`cloche load`")?;
    for odd in ["", "UPPER", "../../etc", "a b", ":", "busybox@sha256:00", &"x".repeat(5000)] {
        bed.sandbox(odd).command(&["true"]).run()?.refused().with_context(|| format!("image {odd:?}"))?;
    }
    Ok(())
}

fn relative_working_directory_is_refused(bed: &Bed) -> Story {
    bed.busybox()
        .with("-w", "etc")
        .command(&["true"])
        .run()?
        .refused_with(125)?
        .says("etc")?
        .says("absolute")?;
    bed.busybox()
        .with("-w", "/etc/passwd")
        .command(&["true"])
        .run()?
        .refused_with(125)?
        .says("/etc/passwd")?;
    Ok(())
}

fn mistaken_values_are_refused(bed: &Bed) -> Story {
    let long_name = "n".repeat(4096);
    for (option, value) in [
        ("-e", "=value"),
        ("--name", "not/a/name"),
        ("--name", ".."),
        ("--name", ""),
        ("--name", &long_name),
        ("--hostname", ""),
        ("--hostname", &"h".repeat(65)),
        ("--hostname", "two words"),
        ("-u", "-1"),
        ("-u", ":::"),
        ("--trace", "xml"),
    ] {
        let sandbox = match option.strip_prefix("--") {
            Some(_) => bed.busybox().option(&format!("{option}={value}")),
            None => bed.busybox().with(option, value),
        };
        sandbox.command(&["true"]).run()?.refused().with_context(|| format!("{option} {value:?}"))?;
    }
    Ok(())
}

fn command_without_anything_to_run_is_refused(bed: &Bed) -> Story {
    let mut image = crate::image::Image::new(vec![crate::tar::Archive::default().finish()]);
    image.config = serde_json::json!({});
    let image = bed.generate("blank", &image)?;
    image.sandbox().run()?.refused_with(125)?.says("command")?;
    image.sandbox().command(&["/bin/true"]).run()?.refused_with(127)?.says("/bin/true")?;
    bed.busybox().command(&[""]).run()?.refused_with(127)?;
    Ok(())
}

fn unusable_state_directory_is_named(bed: &Bed) -> Story {
    // A file where a directory would have to be.
    let blocked = bed.write("file", b"")?.join("state");
    let bed = bed.with_state(&blocked)?;
    bed.busybox().command(&["true"]).run()?.refused_with(125)?.says(&blocked.to_string_lossy())?;
    Ok(())
}

fn kernel_for_a_container_is_refused(bed: &Bed) -> Story {
    bed.busybox()
        .with("--kernel", "/boot/vmlinuz")
        .command(&["true"])
        .run()?
        .refused_with(125)?
        .says("--kernel")?;
    Ok(())
}

fn missing_kernel_is_named(bed: &Bed) -> Story {
    let finished = bed.busybox().with("--kernel", "/no/such/vmlinux").command(&["true"]).run()?;
    finished.refused_with(125)?.says("/no/such/vmlinux")?;
    bed.is_clean()
}

fn kernel_that_is_none_is_refused(bed: &Bed) -> Story {
    let text = bed.write("text", b"this is no kernel\n".repeat(1000).as_slice())?;
    let empty = bed.write("empty", b"")?;
    // An ELF file, but a program's.
    let program = bed.write("program", bed.busybox_binary()?)?;
    for file in [text, empty, program, bed.scratch().to_path_buf()] {
        let path = file.to_string_lossy();
        bed.busybox().with("--kernel", &path).command(&["true"]).run()?.refused_with(125)?.says(&path)?;
    }
    bed.is_clean()
}

fn torn_kernel_is_refused(bed: &Bed) -> Story {
    let whole = bed.run(&["kernel", "path"])?.succeeds()?.out();
    let whole = std::fs::read(whole.trim_end())?;
    for length in [64, 4096, whole.len() / 2] {
        let torn = bed.write("torn", &whole[..length.min(whole.len())])?;
        let path = torn.to_string_lossy();
        bed.busybox().with("--kernel", &path).command(&["true"]).run()?.refused_with(125)?.says(&path)?;
    }
    bed.is_clean()
}

fn kernel_without_drivers_names_them(bed: &Bed) -> Story {
    let kernel = bed.world().cloud_kernel.as_deref().unwrap_or_else(|| std::path::Path::new("/"));
    let finished = bed.busybox().with("--kernel", &kernel.to_string_lossy()).command(&["true"]).run()?;
    let finished = finished.refused_with(125)?;
    let said = finished.err().to_lowercase();
    // Its virtio, EROFS and overlay are all modules, and the initramfs has none.
    let names_one = ["virtio", "erofs", "overlay", "vsock"].iter().any(|driver| said.contains(driver));
    ensure!(names_one, "no missing driver is named\n{finished}");
    bed.is_clean()
}

fn default_isolation_without_kvm_fails_closed(bed: &Bed) -> Story {
    for isolation in [None, Some("vm")] {
        let finished = bed.busybox().isolation(isolation).command(&["echo", "ran"]).run()?;
        finished.refused_with(125)?.prints("")?.says("kvm")?.says("cloche doctor")?;
    }
    bed.is_clean()
}
