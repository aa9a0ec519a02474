//! `cloche share`: the process that serves files of the host to one VM. Its socket is stdin; what it has to say, to the
//! engine only, goes to stdout.

use std::process::ExitCode;

/// Serves to the end of the socket.
pub fn main() -> ExitCode {
    match cloche_share::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}
