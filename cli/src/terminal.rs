//! Asking people for what nobody else should see.

use std::io::{self, BufRead, IsTerminal, stdin};

use anyhow::{Context, ensure};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// Asks for a line without showing it.
pub fn ask_secret(question: &str) -> anyhow::Result<String> {
    ensure!(stdin().is_terminal(), "stdin is no terminal; pipe the password in with --password-stdin");
    let silence = Silence::begin().context("cannot stop the terminal from showing the password")?;
    eprint!("{question}");
    let mut line = String::new();
    let read = stdin().lock().read_line(&mut line);
    drop(silence);
    eprint!("\n");
    read.context("cannot read the password")?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// While this lives, the terminal shows nothing of what is typed.
struct Silence(Termios);

impl Silence {
    fn begin() -> io::Result<Silence> {
        let before = tcgetattr(stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(stdin(), OptionalActions::Flush, &silent)?;
        Ok(Silence(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), OptionalActions::Flush, &self.0);
    }
}
