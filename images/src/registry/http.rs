//! HTTP/1.1 (RFC 9110, RFC 9112), as much of it as a registry's client needs: requests with a body of known length,
//! answers of known length, in chunks, or up to the connection's end, and connections that serve again.
//!
//! Written for this crate: what a registry can do to us is bounded in time ([`Patience`]) and memory at every read,
//! and a download can be given up for being slow, which clients with one time-out for all cannot do.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ClientConfig;

use super::proxy::Proxies;
use super::tls::{self, TlsError};
use super::url::Url;
use super::wire::{Patience, Wire};

/// Bytes of an answer's head. Go's servers and clients have the same order of bounds.
const MAX_HEAD: usize = 64 << 10;
const MAX_FIELDS: usize = 100;
/// Redirects in a row. Real registries have one, to where their blobs lie.
const MAX_REDIRECTS: usize = 5;
/// Connections kept for later.
const MAX_IDLE: usize = 8;
const PIECE: usize = 64 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// Nobody can be reached.
    #[error("cannot connect to {host}{}", in_brackets(.hint))]
    Connect {
        /// Host and port.
        host: String,
        /// What can be done.
        hint: Option<&'static str>,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or nothing came for too long.
    #[error("{method} {url} failed")]
    Exchange {
        /// What was asked.
        method: &'static str,
        /// Of what.
        url: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The answer is not HTTP, or breaks its rules.
    #[error("{url} answered with {problem}")]
    Malformed {
        /// Who.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// One redirect after the other.
    #[error("{url} leads from one redirect to the next, more than {MAX_REDIRECTS} times")]
    Redirects {
        /// Where it began.
        url: String,
    },
    /// Where plain HTTP would be spoken with another machine.
    #[error("{from} leads to {to}, which is not encrypted; only https is used with other machines")]
    Unencrypted {
        /// Who said so.
        from: String,
        /// The URL.
        to: String,
    },
    /// Another machine says what this one is to be asked for.
    #[error("{from} leads to {to}, which is this machine; a redirect to it is followed only from itself")]
    Inward {
        /// Who said so.
        from: String,
        /// The URL.
        to: String,
    },
    /// Certificates could not be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

fn in_brackets(hint: &Option<&'static str>) -> String {
    hint.map(|hint| format!(" ({hint})")).unwrap_or_default()
}

/// What a request carries.
pub(super) enum Body<'a> {
    Empty,
    Bytes(&'a [u8]),
    Stream { reader: &'a mut (dyn Read + 'a), bytes: u64 },
}

/// A request, without the fields that all have.
pub(super) struct Request<'a> {
    pub(super) method: &'static str,
    pub(super) url: Url,
    pub(super) fields: Vec<(&'static str, String)>,
    pub(super) body: Body<'a>,
}

impl Request<'_> {
    pub(super) fn new(method: &'static str, url: Url) -> Self {
        Request { method, url, fields: Vec::new(), body: Body::Empty }
    }

    pub(super) fn field(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((name, value.into()));
        self
    }
}

/// Speaks with any number of servers, from any number of threads.
#[derive(Debug)]
pub(super) struct Http {
    patience: Patience,
    /// Servers on this machine may speak plain HTTP, and need no certificate.
    trust_loopback: bool,
    proxies: Proxies,
    configs: Mutex<HashMap<String, Arc<ClientConfig>>>,
    idle: Mutex<Vec<(String, Connection)>>,
}

impl Http {
    pub(super) fn new(patience: Patience, trust_loopback: bool, proxies: Proxies) -> Http {
        Http { patience, trust_loopback, proxies, configs: Mutex::default(), idle: Mutex::default() }
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    pub(super) fn trusts(&self, url: &Url) -> bool {
        self.trust_loopback && url.is_loopback()
    }

    /// Sends a request and reads the answer's head. Redirects of what only asks are followed; a secret goes to the
    /// first server only.
    pub(super) fn send(&self, mut request: Request<'_>) -> Result<Response<'_>, HttpError> {
        let begin = request.url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            if !request.url.secure && !self.trusts(&request.url) {
                return Err(HttpError::Unencrypted { from: begin, to: request.url.to_string() });
            }
            let response = self.exchange(&mut request)?;
            let follows = matches!(response.status, 301 | 302 | 303 | 307 | 308)
                && matches!(request.method, "GET" | "HEAD");
            if !follows {
                return Ok(response);
            }
            let location = response.field("location").and_then(|location| request.url.join(location));
            let Some(next) = location else {
                let problem = "a redirect to nowhere".to_owned();
                return Err(HttpError::Malformed { url: request.url.to_string(), problem });
            };
            drop(response);
            if next.is_loopback() && !request.url.is_loopback() {
                return Err(HttpError::Inward { from: request.url.to_string(), to: next.to_string() });
            }
            if !next.has_origin_of(&request.url) {
                request.fields.retain(|(name, _)| *name != "Authorization");
            }
            request.url = next;
        }
        Err(HttpError::Redirects { url: begin })
    }

    fn exchange(&self, request: &mut Request<'_>) -> Result<Response<'_>, HttpError> {
        let failed = |method, url: &Url, source| HttpError::Exchange { method, url: url.to_string(), source };
        let origin = request.url.origin();
        // One that was kept may have been closed meanwhile; a stream cannot be sent twice, so it gets a new one.
        if !matches!(request.body, Body::Stream { .. })
            && let Some(mut connection) = self.take_idle(&origin)
        {
            match connection.exchange(request) {
                Ok(head) => return self.respond(request, connection, head),
                Err(error) if is_stale(&error) => {}
                Err(error) => return Err(failed(request.method, &request.url, error)),
            }
        }
        let mut connection = self.connect(&request.url)?;
        let head =
            connection.exchange(request).map_err(|error| failed(request.method, &request.url, error))?;
        self.respond(request, connection, head)
    }

    fn respond(
        &self,
        request: &Request<'_>,
        mut connection: Connection,
        head: Head,
    ) -> Result<Response<'_>, HttpError> {
        let framing = head.framing(request.method).map_err(|problem| HttpError::Malformed {
            url: request.url.to_string(),
            problem: problem.to_owned(),
        })?;
        let keep = head.keeps_alive() && framing != Framing::UntilClose;
        connection.wire.expect_body();
        let mut response = Response {
            status: head.status,
            fields: head.fields,
            url: request.url.clone(),
            body: BodyReader {
                http: self,
                origin: request.url.origin(),
                connection: Some(connection),
                framing,
                keep,
            },
        };
        response.body.retire_if_done();
        Ok(response)
    }

    fn connect(&self, url: &Url) -> Result<Connection, HttpError> {
        let trusted = self.trusts(url);
        let tls = if url.secure { Some(self.tls(url)?) } else { None };
        match Wire::connect(url, tls, &self.patience, trusted, self.proxies.of(url)) {
            Ok(wire) => Ok(Connection { wire, buffer: Vec::new(), used: 0 }),
            Err(source) => {
                let hint = (!trusted && url.is_loopback())
                    .then_some("a registry on this machine may do without encryption: --tls-verify=false");
                Err(HttpError::Connect { host: url.authority(), hint, source })
            }
        }
    }

    fn tls(&self, url: &Url) -> Result<Arc<ClientConfig>, HttpError> {
        let authority = url.authority();
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = configs.get(&authority) {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(tls::config(&authority, !self.trusts(url))?);
        configs.insert(authority, Arc::clone(&config));
        Ok(config)
    }

    fn take_idle(&self, origin: &str) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let position = idle.iter().rposition(|(of, _)| of == origin)?;
        Some(idle.swap_remove(position).1)
    }

    fn keep(&self, origin: String, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push((origin, connection));
        }
    }
}

/// Whether an error on a connection that was kept says only that it was closed.
fn is_stale(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::UnexpectedEof
    )
}

/// A connection and what was read ahead of it.
#[derive(Debug)]
struct Connection {
    wire: Wire,
    buffer: Vec<u8>,
    used: usize,
}

impl Connection {
    fn exchange(&mut self, request: &mut Request<'_>) -> io::Result<Head> {
        self.wire.expect_head();
        match self.write_request(request) {
            Ok(()) => {}
            // A server that refuses a body answers before it has read it, and closes.
            Err(error) if is_stale(&error) && matches!(request.body, Body::Stream { .. }) => {
                self.wire.expect_head();
                return self.read_head().map_err(|_| error);
            }
            Err(error) => return Err(error),
        }
        self.wire.expect_head();
        loop {
            let head = self.read_head()?;
            // RFC 9110 §15.2: interim answers come before the real one.
            if !(100..200).contains(&head.status) {
                return Ok(head);
            }
        }
    }

    fn write_request(&mut self, request: &mut Request<'_>) -> io::Result<()> {
        let mut head = format!(
            "{} {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: cloche/{}\r\n",
            request.method,
            request.url.target,
            request.url.authority(),
            env!("CARGO_PKG_VERSION")
        );
        for (name, value) in &request.fields {
            // Tokens and links come from servers; none may add a line of its own.
            if value.bytes().any(|byte| !(b' '..=b'~').contains(&byte)) {
                return Err(io::Error::other(format!("the field {name} would hold control characters")));
            }
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let length = match &request.body {
            Body::Empty if request.method == "POST" || request.method == "PUT" => Some(0),
            Body::Empty => None,
            Body::Bytes(bytes) => Some(bytes.len() as u64),
            Body::Stream { bytes, .. } => Some(*bytes),
        };
        if let Some(length) = length {
            head.push_str(&format!("Content-Length: {length}\r\n"));
        }
        head.push_str("\r\n");
        self.wire.write_all(head.as_bytes())?;
        match &mut request.body {
            Body::Empty => {}
            Body::Bytes(bytes) => self.wire.write_all(bytes)?,
            Body::Stream { reader, bytes } => {
                self.wire.expect_body();
                if io::copy(&mut reader.take(*bytes), &mut self.wire)? != *bytes {
                    return Err(io::Error::other("the file to send has become shorter"));
                }
            }
        }
        self.wire.flush()
    }

    fn read_head(&mut self) -> io::Result<Head> {
        loop {
            let unread = self.buffer.get(self.used..).unwrap_or_default();
            if let Some((head, bytes)) = Head::parse(unread)? {
                self.used += bytes;
                return Ok(head);
            }
            if unread.len() >= MAX_HEAD {
                return Err(io::Error::other(format!(
                    "the head of the answer has more than {MAX_HEAD} bytes"
                )));
            }
            if self.fill()? == 0 {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "the connection was closed without an answer",
                ));
            }
        }
    }

    /// Reads more into the buffer, and tells how much.
    fn fill(&mut self) -> io::Result<usize> {
        self.buffer.drain(..self.used);
        self.used = 0;
        let start = self.buffer.len();
        self.buffer.resize(start + PIECE, 0);
        let result = self.wire.read(self.buffer.get_mut(start..).unwrap_or_default());
        self.buffer.truncate(start + result.as_ref().map_or(0, |count| *count));
        result
    }

    /// What was read ahead, or else straight from the wire.
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        let ahead = self.buffer.get(self.used..).unwrap_or_default();
        if ahead.is_empty() {
            return self.wire.read(output);
        }
        let count = ahead.len().min(output.len());
        for (to, from) in output.iter_mut().zip(ahead) {
            *to = *from;
        }
        self.used += count;
        Ok(count)
    }

    /// One line, without its end; at most 1 KiB.
    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            if self.used == self.buffer.len() && self.fill()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if self.read(&mut byte)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match byte {
                [b'\n'] => break,
                [byte] => line.push(byte),
            }
            if line.len() > 1024 {
                return Err(io::Error::other("a line between chunks has no end"));
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

#[derive(Debug)]
struct Head {
    status: u16,
    http_1_0: bool,
    /// Names in lower case.
    fields: Vec<(String, String)>,
}

impl Head {
    /// A whole head at the start of `bytes`, and its length.
    fn parse(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        match response.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => {
                let fields = response.headers.iter().map(|field| {
                    (field.name.to_ascii_lowercase(), String::from_utf8_lossy(field.value).trim().to_owned())
                });
                let status = response.code.unwrap_or_default();
                let http_1_0 = response.version == Some(0);
                Ok(Some((Head { status, http_1_0, fields: fields.collect() }, length)))
            }
            Ok(httparse::Status::Partial) => Ok(None),
            Err(error) => Err(io::Error::other(format!("the answer is not HTTP: {error}"))),
        }
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    fn keeps_alive(&self) -> bool {
        let connection = self.field("connection").unwrap_or_default().to_ascii_lowercase();
        if self.http_1_0 { connection.contains("keep-alive") } else { !connection.contains("close") }
    }

    /// RFC 9112 §6.3.
    fn framing(&self, method: &str) -> Result<Framing, &'static str> {
        if method == "HEAD" || matches!(self.status, 204 | 304) {
            return Ok(Framing::Length(0));
        }
        if let Some(coding) = self.field("transfer-encoding") {
            return match coding.eq_ignore_ascii_case("chunked") {
                true => Ok(Framing::Chunked { left: 0, first: true }),
                false => Err("a transfer coding other than chunked"),
            };
        }
        let mut lengths =
            self.fields.iter().filter(|(name, _)| name == "content-length").map(|(_, value)| value);
        let Some(length) = lengths.next() else { return Ok(Framing::UntilClose) };
        if lengths.any(|other| other != length) {
            return Err("two different lengths");
        }
        length.parse().map(Framing::Length).map_err(|_| "a length that is no number")
    }
}

/// Reads a head as far as that goes, and shows its fields.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz_head(bytes: &[u8], mut field: impl FnMut(&str, &str)) {
    let Ok(Some((head, length))) = Head::parse(bytes) else { return };
    assert!(length <= bytes.len() && head.fields.len() <= MAX_FIELDS);
    let _ = (head.framing("GET"), head.keeps_alive());
    head.fields.iter().for_each(|(name, value)| field(name, value));
}

/// Where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// That many bytes are left.
    Length(u64),
    Chunked {
        left: u64,
        first: bool,
    },
    UntilClose,
}

/// An answer, whose body is yet to be read.
#[derive(Debug)]
pub(super) struct Response<'h> {
    pub(super) status: u16,
    fields: Vec<(String, String)>,
    /// Who answered, after redirects.
    pub(super) url: Url,
    pub(super) body: BodyReader<'h>,
}

impl Response<'_> {
    /// A field's value; the name is in lower case.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// All values of a field.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// The body's length, if the server tells it.
    pub(super) fn length(&self) -> Option<u64> {
        self.field("content-length").and_then(|length| length.parse().ok())
    }

    /// The whole body, if it has at most `limit` bytes.
    pub(super) fn read(self, limit: u64) -> Result<Vec<u8>, HttpError> {
        let url = self.url.to_string();
        let mut content = Vec::new();
        let read = self.body.take(limit + 1).read_to_end(&mut content);
        read.map_err(|source| HttpError::Exchange { method: "reading", url: url.clone(), source })?;
        if content.len() as u64 > limit {
            return Err(HttpError::Malformed { url, problem: format!("more than {limit} bytes") });
        }
        Ok(content)
    }
}

/// Reads an answer's body, and gives the connection back at its end.
#[derive(Debug)]
pub(super) struct BodyReader<'h> {
    http: &'h Http,
    origin: String,
    /// Until the body has ended.
    connection: Option<Connection>,
    framing: Framing,
    keep: bool,
}

impl BodyReader<'_> {
    fn retire_if_done(&mut self) {
        if self.framing == Framing::Length(0) {
            self.retire();
        }
    }

    fn retire(&mut self) {
        if let Some(connection) = self.connection.take()
            && self.keep
        {
            self.http.keep(std::mem::take(&mut self.origin), connection);
        }
    }

    /// Goes on to the next chunk with bytes in it; `false` at the end.
    fn next_chunk(connection: &mut Connection, first: bool) -> io::Result<Option<u64>> {
        let malformed = || io::Error::other("a chunk has no length");
        if !first && !connection.read_line()?.is_empty() {
            return Err(io::Error::other("a chunk is longer than it says"));
        }
        let line = connection.read_line()?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let length = u64::from_str_radix(digits, 16).map_err(|_| malformed())?;
        if length > 0 {
            return Ok(Some(length));
        }
        // Trailers say nothing to us.
        for _ in 0..MAX_FIELDS {
            if connection.read_line()?.is_empty() {
                return Ok(None);
            }
        }
        Err(io::Error::other("the trailers have no end"))
    }
}

impl Read for BodyReader<'_> {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        let Some(connection) = &mut self.connection else { return Ok(0) };
        if output.is_empty() {
            return Ok(0);
        }
        let limit = match &mut self.framing {
            Framing::UntilClose => u64::MAX,
            Framing::Length(left) => *left,
            Framing::Chunked { left, first } => {
                if *left == 0 {
                    match BodyReader::next_chunk(connection, *first)? {
                        Some(length) => (*left, *first) = (length, false),
                        None => {
                            self.retire();
                            return Ok(0);
                        }
                    }
                }
                *left
            }
        };
        let most = output.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        let count = connection.read(output.get_mut(..most).unwrap_or_default())?;
        connection.wire.progressed(count);
        match &mut self.framing {
            Framing::UntilClose if count == 0 => self.connection = None,
            Framing::UntilClose => {}
            _ if count == 0 => {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "the connection was closed in the middle",
                ));
            }
            Framing::Length(left) => {
                *left -= count as u64;
                self.retire_if_done();
            }
            Framing::Chunked { left, .. } => *left -= count as u64,
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(head: &str, method: &str) -> Result<Framing, &'static str> {
        Head::parse(head.as_bytes()).unwrap().unwrap().0.framing(method)
    }

    #[test]
    fn head_tells_where_the_body_ends() {
        let ok = "HTTP/1.1 200 OK\r\n";
        assert_eq!(framing(&format!("{ok}Content-Length: 12\r\n\r\n"), "GET"), Ok(Framing::Length(12)));
        assert_eq!(framing(&format!("{ok}Content-Length: 12\r\n\r\n"), "HEAD"), Ok(Framing::Length(0)));
        assert_eq!(framing(&format!("{ok}\r\n"), "GET"), Ok(Framing::UntilClose));
        let chunked = format!("{ok}Transfer-Encoding: chunked\r\n\r\n");
        assert_eq!(framing(&chunked, "GET"), Ok(Framing::Chunked { left: 0, first: true }));
        for bad in ["Content-Length: 1\r\nContent-Length: 2", "Content-Length: -1", "Transfer-Encoding: br"] {
            assert!(framing(&format!("{ok}{bad}\r\n\r\n"), "GET").is_err(), "{bad}");
        }
        assert!(Head::parse(b"SSH-2.0-OpenSSH\r\n\r\n").is_err());
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\nA: b\r\n").unwrap().is_none());
    }
}
