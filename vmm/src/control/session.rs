//! One client's connection: lines in, lines out, with a bound on both. Register logic: it knows no epoll and no machine.
//!
//! ```text
//!   reading ── a line ──▶ waiting ── reply ──▶ writing ── all written ──▶ reading
//!      └── end of stream, a line too long (after its refusal), an error ──▶ closed
//! ```
//! One request at a time: while its answer is not taken, no further one is read, so a client that does not read stops
//! only itself.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

use std::{collections::VecDeque, io};

use super::api::{Call, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Outcome, RefusalCode, Reply, Request, VERSION};

/// A non-blocking stream.
pub trait Stream {
    /// Reads; 0 is the end.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize>;
    /// Writes.
    fn write(&mut self, from: &[u8]) -> io::Result<usize>;
}

/// What a session waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// The client's next request.
    Readable,
    /// Room for the rest of a reply.
    Writable,
    /// The machine.
    Nothing,
}

/// A client.
#[derive(Debug)]
pub struct Session<S> {
    /// Its connection.
    pub stream: S,
    unread: VecDeque<u8>,
    unwritten: VecDeque<u8>,
    waiting: bool,
    /// No more requests are taken.
    ended: bool,
    /// Everything is over.
    closed: bool,
}

impl<S: Stream> Session<S> {
    /// A client that has said nothing yet.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            unread: VecDeque::new(),
            unwritten: VecDeque::new(),
            waiting: false,
            ended: false,
            closed: false,
        }
    }

    /// Whether it is over: drop it.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// What to wait for.
    pub fn interest(&self) -> Interest {
        if !self.unwritten.is_empty() {
            Interest::Writable
        } else if self.waiting {
            Interest::Nothing
        } else {
            Interest::Readable
        }
    }

    /// The connection is ready for something. Returns a request if one is complete; [`Session::reply`] must follow,
    /// now or later.
    pub fn ready(&mut self) -> Option<Request> {
        if !self.unwritten.is_empty() {
            self.flush();
        }
        if self.interest() == Interest::Readable && !self.closed {
            // What came with the previous request needs no further bytes.
            return self.next_request().or_else(|| {
                self.fill();
                self.next_request()
            });
        }
        None
    }

    /// The client hung up while nothing was expected of it.
    pub fn hung_up(&mut self) {
        if self.interest() == Interest::Nothing {
            self.closed = true;
        }
    }

    fn fill(&mut self) {
        let mut chunk = [0; MAX_REQUEST_BYTES];
        let room = MAX_REQUEST_BYTES.saturating_sub(self.unread.len());
        let Some(target) = chunk.get_mut(..room) else { return };
        match self.stream.read(target) {
            Ok(0) => self.closed = true,
            Ok(count) => self.unread.extend(target.iter().take(count)),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.closed = true,
        }
    }

    /// The next whole line that is a call; what is none is answered here.
    fn next_request(&mut self) -> Option<Request> {
        if self.ended || self.closed || self.interest() != Interest::Readable {
            return None;
        }
        let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') else {
            if self.unread.len() >= MAX_REQUEST_BYTES {
                self.ended = true;
                let message =
                    format!("a request has at most {MAX_REQUEST_BYTES} bytes, its newline included");
                self.reply(&Outcome::refused(RefusalCode::BadRequest, message));
            }
            return None;
        };
        let line: Vec<u8> = self.unread.drain(..=end).collect();
        match parse(&line) {
            Ok(request) => {
                self.waiting = true;
                Some(request)
            }
            Err(refusal) => {
                self.reply(&refusal);
                None
            }
        }
    }

    /// Answers the request that [`Session::ready`] returned.
    pub fn reply(&mut self, outcome: &Outcome) {
        self.waiting = false;
        // Every reply has a JSON form.
        let mut line = serde_json::to_vec(&Reply::new(outcome.clone())).unwrap_or_default();
        if line.len() >= MAX_REPLY_BYTES {
            let message = format!("the answer has more than {MAX_REPLY_BYTES} bytes");
            let refused = Outcome::refused(RefusalCode::Host, message);
            line = serde_json::to_vec(&Reply::new(refused)).unwrap_or_default();
        }
        line.push(b'\n');
        self.unwritten = line.into();
        self.flush();
    }

    fn flush(&mut self) {
        while !self.unwritten.is_empty() {
            let (front, _) = self.unwritten.as_slices();
            match self.stream.write(front) {
                Ok(0) => break,
                Ok(count) => drop(self.unwritten.drain(..count)),
                Err(error) if is_transient(&error) => return,
                Err(_) => {
                    self.unwritten.clear();
                    self.closed = true;
                    return;
                }
            }
        }
        if self.unwritten.is_empty() {
            self.closed |= self.ended;
        }
    }

    /// Whether a request was taken that has no reply yet.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Whether a request has come that needs no more reading.
    pub fn has_line(&self) -> bool {
        self.interest() == Interest::Readable && !self.closed && self.unread.contains(&b'\n')
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A line as a request, or the refusal that answers it.
fn parse(line: &[u8]) -> Result<Request, Outcome> {
    /// The part of a call that every version has.
    #[derive(serde::Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let bad = |error: serde_json::Error| {
        Outcome::refused(RefusalCode::BadRequest, format!("this is no request: {error}"))
    };
    let AnyVersion { version } = serde_json::from_slice(line).map_err(bad)?;
    if version != VERSION {
        let message = format!("version is {version}; this VMM speaks version {VERSION}");
        return Err(Outcome::refused(RefusalCode::Version, message));
    }
    serde_json::from_slice::<Call>(line).map(|call| call.request).map_err(bad)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::api::{Answer, RunState};

    /// Gives what it is told, in the pieces it is told; takes so many bytes.
    #[derive(Default)]
    struct Pipe {
        incoming: VecDeque<Vec<u8>>,
        ended: bool,
        outgoing: Vec<u8>,
        room: usize,
    }

    impl Stream for Pipe {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let Some(mut piece) = self.incoming.pop_front() else {
                return if self.ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
            };
            let count = piece.len().min(into.len());
            into[..count].copy_from_slice(&piece[..count]);
            piece.drain(..count);
            if !piece.is_empty() {
                self.incoming.push_front(piece);
            }
            Ok(count)
        }

        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            let count = from.len().min(self.room);
            if count == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.room -= count;
            self.outgoing.extend(&from[..count]);
            Ok(count)
        }
    }

    const PAUSE: &[u8] = b"{\"version\":1,\"request\":\"pause\"}\n";

    fn session(pieces: &[&[u8]]) -> Session<Pipe> {
        let incoming = pieces.iter().map(|piece| piece.to_vec()).collect();
        Session::new(Pipe { incoming, room: usize::MAX, ..Pipe::default() })
    }

    fn paused() -> Outcome {
        Outcome::Answer(Answer::State(RunState::Paused))
    }

    fn replies(session: &Session<Pipe>) -> Vec<Reply> {
        let lines = session.stream.outgoing.split_inclusive(|byte| *byte == b'\n');
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    #[test]
    fn request_in_two_pieces_is_taken_once_complete() {
        let mut session = session(&[&PAUSE[..10], &PAUSE[10..]]);
        assert_eq!(session.ready(), None);
        assert_eq!(session.ready(), Some(Request::Pause));
        assert_eq!(session.interest(), Interest::Nothing);
        session.reply(&paused());
        assert_eq!(session.interest(), Interest::Readable);
        assert_eq!(replies(&session), [Reply::new(paused())]);
    }

    #[test]
    fn second_request_waits_for_the_first_ones_reply() {
        let mut session = session(&[&[PAUSE, PAUSE].concat()]);
        assert_eq!(session.ready(), Some(Request::Pause));
        assert_eq!(session.ready(), None);
        session.reply(&paused());
        assert!(session.has_line());
        assert_eq!(session.ready(), Some(Request::Pause));
    }

    #[test]
    fn client_that_does_not_read_is_read_no_further() {
        let mut session = session(&[PAUSE, PAUSE]);
        session.stream.room = 5;
        assert_eq!(session.ready(), Some(Request::Pause));
        session.reply(&paused());
        assert_eq!(session.interest(), Interest::Writable);
        assert_eq!(session.ready(), None);
        session.stream.room = usize::MAX;
        assert_eq!(session.ready(), Some(Request::Pause));
        assert_eq!(replies(&session).len(), 1);
    }

    #[test]
    fn line_without_end_is_refused_and_closed() {
        let mut session = session(&[&[b'x'; 3 * MAX_REQUEST_BYTES]]);
        assert_eq!(session.ready(), None);
        assert!(session.is_closed());
        assert!(
            matches!(&replies(&session)[0].outcome, Outcome::Error(refusal) if refusal.code == RefusalCode::BadRequest)
        );
    }

    #[test]
    fn other_version_and_nonsense_are_told_apart_and_survived() {
        let mut session = session(&[b"{\"version\":2,\"request\":\"new\"}\nnonsense\n", PAUSE]);
        assert_eq!(session.ready(), None);
        // The line that is here already is answered before more is read.
        assert_eq!(session.ready(), Some(Request::Pause));
        let codes: Vec<_> = replies(&session)
            .into_iter()
            .map(|reply| match reply.outcome {
                Outcome::Error(refusal) => refusal.code,
                Outcome::Answer(answer) => panic!("{answer:?}"),
            })
            .collect();
        assert_eq!(codes, [RefusalCode::Version, RefusalCode::BadRequest]);
    }

    #[test]
    fn end_of_stream_closes_but_not_under_an_answer() {
        let mut session = session(&[PAUSE]);
        session.stream.ended = true;
        assert_eq!(session.ready(), Some(Request::Pause));
        session.reply(&paused());
        assert_eq!(replies(&session).len(), 1);
        assert_eq!(session.ready(), None);
        assert!(session.is_closed());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_in_bounds(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..300),
                    Just(PAUSE.to_vec()),
                    Just(b"\n".to_vec()),
                    Just(vec![b'{'; 5000]),
                ],
                0..20,
            ),
            room in 0..4096usize,
        ) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let mut session = session(&pieces);
            session.stream.ended = true;
            session.stream.room = room;
            for _ in 0..200 {
                if session.ready().is_some() {
                    prop_assert!(!session.is_closed());
                    session.reply(&paused());
                }
                prop_assert!(session.unread.len() <= MAX_REQUEST_BYTES);
                prop_assert!(session.unwritten.len() <= MAX_REPLY_BYTES);
                if session.is_closed() {
                    break;
                }
                session.stream.room = session.stream.room.saturating_add(64);
            }
        }
    }
}
