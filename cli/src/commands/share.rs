//! `cloche share`: the process that serves files of the host to one VM. Its socket is stdin; what it has to say, to the
//! engine only, goes to stdout.

use std::{ffi::OsString, process::ExitCode};

/// Serves to the end of the socket. `words` are the arguments after `share`.
pub fn main(words: impl Iterator<Item = OsString>) -> ExitCode {
    let served = super::tie_to_parent(words).and_then(|()| Ok(cloche_share::run()?));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
