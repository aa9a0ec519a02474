//! The console device.

use serde_json::json;

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] =
    &[body!(output_of_the_console_device_is_kept_without_a_terminal).only(Isolation::Vm)];

fn output_of_the_console_device_is_kept_without_a_terminal(bed: &Bed) -> Story {
    let ran =
        Guest::new(bed)?.with(json!({ "console": {} })).run("echo printed on hvc0 > /dev/hvc0")?.passes()?;
    ran.prints("printed on hvc0")
}
