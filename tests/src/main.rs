//! The end-to-end suite: the same stories told under both isolations, by driving the real `cloche` binary.
//!
//! ```text
//! cloche-tests [--isolation container|vm|both] [libtest options] [FILTER]
//! ```
//!
//! The binary is static and needs no program of the host but `cloche`, so it can be copied into an emulated host
//! and run there. It reads its surroundings from the environment; see [`world`].
//!
//! ```text
//! suite ── registers ──▶ bodies::*        what must hold, as stories
//!   │                       │ use
//!   └─ gives each a ──▶ bed::Bed ──▶ sandbox ──▶ process      drive `cloche`
//!                           ├──────▶ leftovers, procfs        look at what it leaves on the host
//!                           ├──────▶ image, tree, tar, noise  make images whose content is known
//!                           └──────▶ guest ──▶ cpio           boot a bare guest for tests of its devices
//! ```

mod alone;
mod bed;
mod bodies;
mod cpio;
mod file_probe;
mod finished;
mod guest;
mod image;
mod lan;
mod leftovers;
mod mapping;
mod noise;
mod plain_user;
mod probe;
mod process;
mod procfs;
mod registry;
mod sandbox;
mod suite;
mod tar;
mod tree;
mod vsock;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, command, rest @ ..] = arguments.as_slice()
        && command == "probe"
    {
        return probe::main(rest);
    }
    if let [_, command, rest @ ..] = arguments.as_slice()
        && command == "plain-user"
    {
        return plain_user::main(rest);
    }
    match suite::run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cloche-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}
