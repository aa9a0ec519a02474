//! The client's end of the control socket: one request, one reply, with a deadline.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use super::api::{Answer, Call, MAX_REPLY_BYTES, Outcome, Refusal, Reply, Request};

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the VM has ended, or has not begun.
    #[error("cannot reach the VM's control socket")]
    Connect(#[source] io::Error),
    /// No whole reply came.
    #[error("the VM's VMM does not answer on its control socket")]
    Silent(#[source] io::Error),
    /// What came is no reply.
    #[error("the VM's VMM sent what is no reply")]
    Malformed(#[source] serde_json::Error),
    /// The VM said no.
    #[error(transparent)]
    Refused(Refusal),
}

/// Sends one request to the VM that listens at `socket`, and waits `patience` for its reply.
pub fn ask(socket: &Path, request: Request, patience: Duration) -> Result<Answer, ClientError> {
    let deadline = Instant::now() + patience;
    let mut stream = UnixStream::connect(socket).map_err(ClientError::Connect)?;
    let mut line = serde_json::to_vec(&Call::new(request)).map_err(ClientError::Malformed)?;
    line.push(b'\n');
    stream
        .set_write_timeout(Some(patience))
        .and_then(|()| stream.write_all(&line))
        .map_err(ClientError::Silent)?;
    let line = read_line(&mut stream, deadline).map_err(ClientError::Silent)?;
    let reply: Reply = serde_json::from_slice(&line).map_err(ClientError::Malformed)?;
    match reply.outcome {
        Outcome::Answer(answer) => Ok(answer),
        Outcome::Error(refusal) => Err(ClientError::Refused(refusal)),
    }
}

fn read_line(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        };
        line.extend(chunk.iter().take(count));
        if line.last() == Some(&b'\n') {
            return Ok(line);
        }
        if line.len() > MAX_REPLY_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}
