//! The way to a registry through a proxy, as `HTTPS_PROXY` and `NO_PROXY` have it (either in lower case, too). Registries
//! on this machine are never asked through one, and others are only spoken to in TLS, so the proxy is a tunnel (RFC 9110
//! §9.3.6) and sees names and sizes at most.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use super::base64;
use super::url::{Url, split_port};

/// Bytes of a proxy's answer.
const MAX_HEAD: usize = 16 << 10;

/// Through which machine others are reached. The default is through none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    https: Option<Proxy>,
    /// Reached directly.
    exceptions: Vec<Exception>,
}

/// A value of the environment that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("HTTPS_PROXY names no proxy that can be used: {0}; write http://[USER:PASSWORD@]HOST[:PORT]")]
pub struct ProxyError(&'static str);

/// A machine that makes tunnels.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Proxy {
    pub(super) host: String,
    pub(super) port: u16,
    /// Value of the field by which it knows us.
    authorization: Option<String>,
}

impl std::fmt::Debug for Proxy {
    /// Without what is secret.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}", self.host, self.port)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    /// An address block, by its first address and the bits that count.
    Block(IpAddr, u32),
    /// A domain in lower case, a port if only that one is meant, and whether the domain itself is.
    Domain {
        name: String,
        port: Option<u16>,
        itself: bool,
    },
}

impl Proxies {
    /// Those of this process's environment.
    pub fn of_environment() -> Result<Proxies, ProxyError> {
        let variable = |upper: &str| {
            let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
            set(upper).or_else(|| set(&upper.to_ascii_lowercase())).unwrap_or_default()
        };
        Proxies::parse(&variable("HTTPS_PROXY"), &variable("NO_PROXY"))
    }

    /// As the two variables would say.
    pub fn parse(https: &str, exceptions: &str) -> Result<Proxies, ProxyError> {
        let https = Some(https.trim()).filter(|https| !https.is_empty());
        let parts = exceptions.split(',').map(str::trim).filter(|part| !part.is_empty());
        Ok(Proxies {
            https: https.map(Proxy::parse).transpose()?,
            exceptions: parts.map(exception).collect(),
        })
    }

    /// The proxy for a server, if it is not reached directly.
    pub(super) fn of(&self, url: &Url) -> Option<&Proxy> {
        let proxy = self.https.as_ref().filter(|_| url.secure && !url.is_loopback())?;
        let host = url.host.to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok();
        let is_meant = |exception: &Exception| match exception {
            Exception::All => true,
            Exception::Block(block, bits) => address.is_some_and(|address| is_within(address, *block, *bits)),
            Exception::Domain { name, port, itself } => {
                let below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                port.is_none_or(|port| port == url.port) && (below || *itself && host == *name)
            }
        };
        Some(proxy).filter(|_| !self.exceptions.iter().any(is_meant))
    }
}

/// What a part of `NO_PROXY` stands for, as Go's `httpproxy` reads it.
fn exception(part: &str) -> Exception {
    let part = part.to_ascii_lowercase();
    if part == "*" {
        return Exception::All;
    }
    if let Some((block, bits)) = part.split_once('/')
        && let (Ok(block), Ok(bits)) = (block.parse(), bits.parse())
    {
        return Exception::Block(block, bits);
    }
    if let Ok(address) = part.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Exception::Block(address, 128);
    }
    let (name, port) = split_port(&part).unwrap_or((&part, None));
    match name.trim_start_matches('*').strip_prefix('.') {
        Some(name) => Exception::Domain { name: name.to_owned(), port, itself: false },
        None => Exception::Domain { name: name.to_owned(), port, itself: true },
    }
}

fn is_within(address: IpAddr, block: IpAddr, bits: u32) -> bool {
    match (address, block) {
        (IpAddr::V4(address), IpAddr::V4(block)) => {
            let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
            address.to_bits() & mask == block.to_bits() & mask
        }
        (IpAddr::V6(address), IpAddr::V6(block)) => {
            let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
            address.to_bits() & mask == block.to_bits() & mask
        }
        _ => false,
    }
}

impl Proxy {
    fn parse(text: &str) -> Result<Proxy, ProxyError> {
        let rest = match text.split_once("://") {
            Some(("http", rest)) => rest,
            Some(("https", _)) => return Err(ProxyError("one that speaks TLS itself is not supported")),
            Some(_) => return Err(ProxyError("it is no HTTP proxy")),
            None => text,
        };
        let rest = rest.split('/').next().unwrap_or(rest);
        let (user, authority) = match rest.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, rest),
        };
        let user = user
            .map(|user| decoded(user).ok_or(ProxyError("its user or password is malformed")))
            .transpose()?;
        let authorization = user.map(|user| {
            let user = if user.contains(&b':') { user } else { [&user[..], b":"].concat() };
            format!("Basic {}", base64::encode(&user))
        });
        let bad = ProxyError("it has no host, or no number as its port");
        // As careful as with any URL.
        let url = Url::parse(&format!("http://{authority}/")).ok_or(bad)?;
        Ok(Proxy { host: url.host, port: url.port, authorization })
    }

    /// Has a connection to the proxy become one to the server.
    pub(super) fn open_tunnel(&self, mut connection: impl Read + Write, url: &Url) -> io::Result<()> {
        let host = if url.host.contains(':') { format!("[{}]", url.host) } else { url.host.clone() };
        let target = format!("{host}:{}", url.port);
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
        }
        request.push_str("\r\n");
        connection.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        // Byte by byte: what follows the head is the server's.
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if connection.read(&mut byte)? == 0 || head.len() >= MAX_HEAD {
                return Err(io::Error::other(format!("the proxy {self:?} gives no answer that is HTTP")));
            }
            head.extend(byte);
        }
        let line = String::from_utf8_lossy(head.split(|byte| *byte == b'\r').next().unwrap_or_default())
            .into_owned();
        let status = line.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
        match status.filter(|_| line.starts_with("HTTP/1.")) {
            Some(200..=299) => Ok(()),
            Some(407) => Err(io::Error::other(format!(
                "the proxy {self:?} asks who you are: write HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT"
            ))),
            Some(status) => {
                Err(io::Error::other(format!("the proxy {self:?} answered {status} when asked for {target}")))
            }
            None => Err(io::Error::other(format!("the proxy {self:?} gives no answer that is HTTP"))),
        }
    }
}

/// Undoes percent encoding.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            byte => bytes.push(byte),
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(https: &str) -> Option<(String, u16, Option<String>)> {
        let proxy = Proxies::parse(https, "").ok()?.https?;
        Some((proxy.host, proxy.port, proxy.authorization))
    }

    #[test]
    fn proxy_is_read_in_all_its_forms() {
        let at = |host: &str, port| Some((host.to_owned(), port, None));
        assert_eq!(proxy("http://proxy.example:3128/"), at("proxy.example", 3128));
        assert_eq!(proxy("proxy.example"), at("proxy.example", 80));
        assert_eq!(proxy("http://[::1]:8080"), at("::1", 8080));
        let (.., authorization) = proxy("http://me:p%40ss@proxy.example").unwrap();
        assert_eq!(authorization.as_deref(), Some("Basic bWU6cEBzcw=="));
        for bad in
            ["https://proxy.example", "socks5://proxy.example", "http://", "http://a:b", "http://a%zz@b"]
        {
            assert_eq!(proxy(bad), None, "{bad}");
        }
    }

    #[test]
    fn exceptions_are_reached_directly() {
        let exceptions = "direct.example, .below.example,port.example:5000,10.0.0.0/8,192.168.1.1,[fd00::1]";
        let proxies = Proxies::parse("http://proxy", exceptions).unwrap();
        let is_direct = |url: &str| proxies.of(&Url::parse(url).unwrap()).is_none();
        for url in [
            "https://direct.example/",
            "https://a.direct.example/",
            "https://a.below.example/",
            "https://port.example:5000/",
            "https://10.1.2.3/",
            "https://192.168.1.1/",
            "https://[fd00::1]/",
            "https://localhost:5000/",
            "https://127.0.0.1/",
        ] {
            assert!(is_direct(url), "{url}");
        }
        for url in [
            "https://notdirect.example/",
            "https://below.example/",
            "https://port.example/",
            "https://11.1.2.3/",
            "https://192.168.1.2/",
            "https://[fd00::2]/",
        ] {
            assert!(!is_direct(url), "{url}");
        }
        assert!(
            Proxies::parse("http://proxy", "*").unwrap().of(&Url::parse("https://x/").unwrap()).is_none()
        );
        assert!(Proxies::default().of(&Url::parse("https://x/").unwrap()).is_none());
    }

    struct Wire(&'static [u8], Vec<u8>);

    impl Read for Wire {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn tunnel_is_open_only_if_the_proxy_says_so() {
        let proxies = Proxies::parse("http://me@proxy", "").unwrap();
        let url = Url::parse("https://host/v2/").unwrap();
        let proxy = proxies.of(&url).unwrap();
        let mut wire = Wire(b"HTTP/1.1 200 Connection established\r\nA: b\r\n\r\nrest", Vec::new());
        proxy.open_tunnel(&mut wire, &url).unwrap();
        assert_eq!(wire.0, b"rest");
        let expected =
            "CONNECT host:443 HTTP/1.1\r\nHost: host:443\r\nProxy-Authorization: Basic bWU6\r\n\r\n";
        assert_eq!(String::from_utf8(wire.1).unwrap(), expected);
        for (answer, problem) in [
            (&b"HTTP/1.1 407 Who\r\n\r\n"[..], "USER:PASSWORD"),
            (b"HTTP/1.1 503 No\r\n\r\n", "503"),
            (b"SSH-2.0\r\n\r\n", "no answer"),
            (b"HTTP/1.1 200", "no answer"),
        ] {
            let error = proxy.open_tunnel(Wire(answer, Vec::new()), &url).unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("proxy:80"), "{error}");
        }
    }
}
