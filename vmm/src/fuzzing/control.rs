//! A client of the control socket that says anything, in any pieces, and reads as it likes.

use std::{collections::VecDeque, io};

use super::input::Input;
use crate::control::{
    api::{Answer, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Outcome, Reply, RunState},
    session::{Session, Stream},
};

#[derive(Default)]
struct Pipe {
    incoming: VecDeque<u8>,
    ended: bool,
    room: usize,
    written: Vec<u8>,
}

impl Stream for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = into.len().min(self.incoming.len());
        if count == 0 && !self.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in into.iter_mut().zip(self.incoming.drain(..count)) {
            *to = from;
        }
        Ok(count)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = from.len().min(self.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room -= count;
        self.written.extend(&from[..count]);
        Ok(count)
    }
}

/// Runs a session. Whatever comes in, what goes out is lines of replies, one for each line that came in at most.
pub fn control_session(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut session = Session::new(Pipe::default());
    let mut lines = 0;
    while !input.is_empty() && !session.is_closed() {
        match input.u8() % 6 {
            // Text is what makes requests: most of the bytes go there.
            0..=2 => {
                let count = usize::from(input.u8());
                let piece = input.bytes(count);
                lines += piece.iter().filter(|byte| **byte == b'\n').count();
                session.stream.incoming.extend(piece);
            }
            3 => session.stream.room += usize::from(input.u16()),
            4 => session.stream.ended |= input.u8() == 0,
            _ if session.is_waiting() => session.reply(&Outcome::Answer(Answer::State(RunState::Paused))),
            _ => session.hung_up(),
        }
        if session.ready().is_some() {
            assert!(session.is_waiting());
        }
    }
    let replies: Vec<&[u8]> = session.stream.written.split(|byte| *byte == b'\n').collect();
    if let Some((_, whole)) = replies.split_last() {
        // A line that never ends is answered too.
        assert!(whole.len() <= lines + 1, "{} replies to {lines} lines", whole.len());
        for line in whole {
            assert!(line.len() < MAX_REPLY_BYTES);
            serde_json::from_slice::<Reply>(line).unwrap();
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let requests = [
        r#"{"version":1,"request":"pause"}"#,
        r#"{"version":1,"request":{"stop":"orderly"}}"#,
        r#"{"version":1,"request":{"resize":{"memory_mib":64}}}"#,
        r#"{"version":1,"request":{"console":{"bytes":10}}}"#,
        r#"{"version":2,"request":"stats"}"#,
    ];
    let say = |text: &str| [&[0, text.len() as u8 + 1][..], text.as_bytes(), b"\n"].concat();
    let one = |text: &&str| [&[3, 0, 4][..], &say(text), &[5]].concat();
    let long = [3, 255, 255].into_iter().chain(
        (0..MAX_REQUEST_BYTES / 255 + 1)
            .flat_map(|_| [0, 255].into_iter().chain(std::iter::repeat_n(b'x', 255))),
    );
    let mut seeds: Vec<Vec<u8>> = requests.iter().map(one).collect();
    seeds.push(long.collect());
    seeds
}
