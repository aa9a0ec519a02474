//! Integration tests of the image store: real archives in, the kernel's view of the layers out, compared with what
//! `umoci` unpacks of the same image.
//!
//! Many need root, a kernel with EROFS, and tools; a test that lacks one is counted as ignored and says which. With
//! root, all runs in a mount namespace of its own, so that nothing stays mounted.

mod archive;
mod bad_input;
mod bed;
mod child;
mod differential;
mod engines;
mod erofs;
mod formats;
mod hostile;
mod killed;
mod layers;
mod merged;
mod model;
mod registry;
mod saving;
mod server;
mod tarball;
mod tree;
mod unpacked;

fn main() -> std::process::ExitCode {
    if let Some(code) = child::run() {
        return code;
    }
    bed::enter_mount_namespace();
    let arguments = libtest_mimic::Arguments::from_args();
    let tests = [
        differential::tests(),
        formats::tests(),
        bad_input::tests(),
        killed::tests(),
        merged::tests(),
        model::tests(),
        registry::tests(),
        hostile::tests(),
        saving::tests(),
        engines::tests(),
        unpacked::tests(),
    ];
    libtest_mimic::run(&arguments, tests.into_iter().flatten().collect()).exit_code()
}
