//! A connection that never waits without end: every exchange of heads has a deadline, and a body that comes more
//! slowly than any real line is given up.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::proxy::Proxy;
use super::url::Url;

/// How long to wait for what.
#[derive(Debug, Clone)]
pub struct Patience {
    /// For a connection to one address.
    pub connect: Duration,
    /// For the head of an answer, all of it, and for TLS' handshake.
    pub head: Duration,
    /// In every such span a body must make at least `min_bytes` of progress.
    pub window: Duration,
    /// Bytes of a body that must come in each `window`.
    pub min_bytes: u64,
    /// Before the first repetition of what failed for now; doubled each time.
    pub retry: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            connect: Duration::from_secs(15),
            // A registry that takes a large layer over to its own store answers after it has.
            head: Duration::from_secs(120),
            window: Duration::from_secs(30),
            min_bytes: 64 << 10,
            retry: Duration::from_millis(500),
        }
    }
}

/// What a connection waits for now.
#[derive(Debug)]
enum Wait {
    /// Until then, whatever comes.
    Until(Instant),
    /// As long as enough comes.
    Progress { since: Instant, bytes: u64 },
}

/// A TCP connection with patience.
#[derive(Debug)]
pub(super) struct Timed {
    tcp: TcpStream,
    patience: Patience,
    wait: Wait,
}

impl Timed {
    /// Connects to the first address that answers. `loopback_only` leaves out all that are not this machine's.
    fn connect(host: &str, port: u16, patience: &Patience, loopback_only: bool) -> io::Result<Timed> {
        const MAX_ADDRESSES: usize = 4;
        let addresses: Vec<SocketAddr> = (host, port)
            .to_socket_addrs()?
            .filter(|address| !loopback_only || address.ip().is_loopback())
            .take(MAX_ADDRESSES)
            .collect();
        let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, patience.connect) {
                Ok(tcp) => {
                    tcp.set_nodelay(true)?;
                    let wait = Wait::Until(Instant::now() + patience.head);
                    return Ok(Timed { tcp, patience: patience.clone(), wait });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// How much longer the next system call may take.
    fn left(&mut self) -> io::Result<Duration> {
        let now = Instant::now();
        let left = match &mut self.wait {
            Wait::Until(deadline) => deadline.saturating_duration_since(now),
            Wait::Progress { since, bytes } => {
                if now.saturating_duration_since(*since) >= self.patience.window {
                    if *bytes < self.patience.min_bytes {
                        let seconds = self.patience.window.as_secs_f32();
                        return Err(io::Error::new(
                            ErrorKind::TimedOut,
                            format!("only {bytes} bytes in {seconds} s"),
                        ));
                    }
                    (*since, *bytes) = (now, 0);
                }
                (*since + self.patience.window).saturating_duration_since(now)
            }
        };
        if left.is_zero() {
            let seconds = self.patience.head.as_secs_f32();
            return Err(io::Error::new(ErrorKind::TimedOut, format!("no answer in {seconds} s")));
        }
        // The system rounds what is shorter down to "for ever".
        Ok(left.max(Duration::from_millis(1)))
    }
}

/// Whether a system call should be tried again, as the time is looked at before.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.left()?;
            self.tcp.set_read_timeout(Some(left))?;
            match self.tcp.read(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            let left = self.left()?;
            self.tcp.set_write_timeout(Some(left))?;
            match self.tcp.write(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection to a server, encrypted or not.
#[derive(Debug)]
pub(super) enum Wire {
    Plain(Timed),
    Tls(Box<StreamOwned<ClientConnection, Timed>>),
}

impl Wire {
    /// Connects to a URL's server, through a proxy if there is one; `tls` is for one that is secure.
    pub(super) fn connect(
        url: &Url,
        tls: Option<Arc<ClientConfig>>,
        patience: &Patience,
        loopback_only: bool,
        proxy: Option<&Proxy>,
    ) -> io::Result<Wire> {
        let mut timed = match proxy {
            None => Timed::connect(&url.host, url.port, patience, loopback_only)?,
            Some(proxy) => {
                let mut timed =
                    Timed::connect(&proxy.host, proxy.port, patience, false).map_err(|error| {
                        io::Error::new(
                            error.kind(),
                            format!("the proxy {proxy:?} cannot be reached: {error}"),
                        )
                    })?;
                proxy.open_tunnel(&mut timed, url)?;
                timed
            }
        };
        let Some(tls) = tls else { return Ok(Wire::Plain(timed)) };
        let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(tls, name).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut timed)?;
        }
        Ok(Wire::Tls(Box::new(StreamOwned::new(connection, timed))))
    }

    fn timed(&mut self) -> &mut Timed {
        match self {
            Wire::Plain(timed) => timed,
            Wire::Tls(stream) => &mut stream.sock,
        }
    }

    /// From now on, all must happen within `Patience::head`.
    pub(super) fn expect_head(&mut self) {
        let timed = self.timed();
        timed.wait = Wait::Until(Instant::now() + timed.patience.head);
    }

    /// So many bytes of a body went through. What frames them (TLS' padding, chunks' extensions) is no progress: there
    /// may be a thousand times as much of it.
    pub(super) fn progressed(&mut self, count: usize) {
        if let Wait::Progress { bytes, .. } = &mut self.timed().wait {
            *bytes += count as u64;
        }
    }

    /// From now on, bytes must flow.
    pub(super) fn expect_body(&mut self) {
        self.timed().wait = Wait::Progress { since: Instant::now(), bytes: 0 };
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(timed) => timed.read(buffer),
            Wire::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = match self {
            Wire::Plain(timed) => timed.write(buffer)?,
            Wire::Tls(stream) => stream.write(buffer)?,
        };
        self.progressed(count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Plain(timed) => timed.flush(),
            Wire::Tls(stream) => stream.flush(),
        }
    }
}
