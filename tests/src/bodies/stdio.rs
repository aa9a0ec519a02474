//! Standard input, output and error: apart, byte-exact and to the end.

use anyhow::ensure;

use crate::bed::Bed;
use crate::image::sha256_hex;
use crate::noise::Noise;
use crate::suite::{Body, Story, body};

/// 20 MiB: more than every buffer on the way.
const LARGE: usize = 20 << 20;

pub const BODIES: &[Body] = &[
    body!(stderr_stays_apart_from_stdout).rootless(),
    body!(twenty_mib_come_through_stdout_unchanged),
    body!(twenty_mib_go_through_stdin_unchanged),
    body!(twenty_mib_make_the_round_trip).rootless(),
    body!(both_outputs_carry_much_at_once),
    body!(every_byte_value_survives),
    body!(end_of_input_reaches_the_process),
    body!(input_arrives_while_the_process_runs).rootless(),
    body!(without_i_the_input_is_empty),
    body!(unread_input_does_not_hold_up_the_end),
    body!(closed_output_does_not_hold_up_the_end),
    body!(reader_that_leaves_ends_the_writer),
];

fn stderr_stays_apart_from_stdout(bed: &Bed) -> Story {
    let finished = bed.busybox().sh("echo out; echo err >&2; echo out again").run()?.succeeds()?;
    ensure!(finished.err() == "err\n", "expected \"err\" alone on stderr\n{finished}");
    finished.prints("out\nout again\n")?;
    Ok(())
}

fn twenty_mib_come_through_stdout_unchanged(bed: &Bed) -> Story {
    let script = format!("head -c {LARGE} /dev/urandom > /data; sha256sum < /data >&2; cat /data");
    let finished = bed.busybox().with("--memory", "256m").sh(&script).run()?.succeeds()?;
    ensure!(finished.stdout.len() == LARGE, "{} of {LARGE} bytes came through", finished.stdout.len());
    let digest = sha256_hex(&finished.stdout);
    finished.says(&digest)?;
    Ok(())
}

fn twenty_mib_go_through_stdin_unchanged(bed: &Bed) -> Story {
    let data = Noise::new(20).bytes(LARGE);
    let expected = format!("{}  -\n", sha256_hex(&data));
    bed.busybox().input(data).command(&["sha256sum"]).run()?.succeeds()?.prints(&expected)?;
    Ok(())
}

fn twenty_mib_make_the_round_trip(bed: &Bed) -> Story {
    let data = Noise::new(21).bytes(LARGE);
    let finished = bed.busybox().input(data.clone()).command(&["cat"]).run()?.succeeds()?;
    ensure!(finished.stdout == data, "{} bytes came back, and not the same", finished.stdout.len());
    Ok(())
}

fn both_outputs_carry_much_at_once(bed: &Bed) -> Story {
    let count = 2 << 20;
    let script = format!("yes out | head -c {count} & yes err | head -c {count} >&2; wait");
    let finished = bed.busybox().sh(&script).run()?.succeeds()?;
    for (bytes, word) in [(&finished.stdout, b"out\n"), (&finished.stderr, b"err\n")] {
        let whole = bytes.len() == count && bytes.chunks(4).all(|chunk| chunk == word);
        ensure!(whole, "{} bytes came through, or not the right ones", bytes.len());
    }
    Ok(())
}

fn every_byte_value_survives(bed: &Bed) -> Story {
    let data: Vec<u8> = (0..=u8::MAX).cycle().take(1000).collect();
    let finished = bed.busybox().input(data.clone()).sh("tee /dev/stderr").run()?.succeeds()?;
    ensure!(finished.stdout == data, "stdout changed\n{finished}");
    ensure!(finished.stderr == data, "stderr changed\n{finished}");
    Ok(())
}

fn end_of_input_reaches_the_process(bed: &Bed) -> Story {
    bed.busybox().input("").sh("cat; echo end").run()?.succeeds()?.prints("end\n")?;
    bed.busybox().input("no newline").sh("cat; echo .").run()?.succeeds()?.prints("no newline.\n")?;
    Ok(())
}

fn input_arrives_while_the_process_runs(bed: &Bed) -> Story {
    let mut running =
        bed.busybox().held_input().sh("while read line; do echo got $line; done; echo end").start()?;
    for word in ["one", "two", "three"] {
        running.write(format!("{word}\n").as_bytes())?;
        running.wait_for_stdout(&format!("got {word}\n"))?;
    }
    running.close_input();
    running.wait()?.succeeds()?.prints("got one\ngot two\ngot three\nend\n")?;
    Ok(())
}

fn without_i_the_input_is_empty(bed: &Bed) -> Story {
    bed.busybox().input_without_i(b"secret").sh("cat; echo end").run()?.succeeds()?.prints("end\n")?;
    Ok(())
}

fn unread_input_does_not_hold_up_the_end(bed: &Bed) -> Story {
    // Much unread data, and a pipe that never ends.
    bed.busybox().input(vec![b'x'; 4 << 20]).command(&["true"]).run()?.succeeds()?;
    let mut running = bed.busybox().held_input().sh("echo up; exit 3").start()?;
    running.wait_for_end()?;
    running.close_input();
    running.wait()?.exits_with(3)?;
    Ok(())
}

fn closed_output_does_not_hold_up_the_end(bed: &Bed) -> Story {
    bed.busybox().sh("exec >&- 2>&-; sleep 1; exit 5").run()?.exits_with(5)?.says_nothing()?;
    Ok(())
}

fn reader_that_leaves_ends_the_writer(bed: &Bed) -> Story {
    // As in `cloche run … | head -1`: the writer gets SIGPIPE, its shell goes on.
    let sandbox = bed.busybox().output_closed_after(1000).sh("yes; echo after >&2; exit 9");
    sandbox.run()?.exits_with(9)?.says("after\n")?;
    Ok(())
}
