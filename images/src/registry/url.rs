//! The few forms of URL that registries answer with.

use std::fmt;
use std::net::IpAddr;

/// `http://` or `https://`, a host, a port, and what the server is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) secure: bool,
    /// Without the brackets of an IPv6 address.
    pub(super) host: String,
    pub(super) port: u16,
    /// Path and query, from the `/` on.
    pub(super) target: String,
}

impl Url {
    /// Parses an absolute URL. User names and passwords in it are refused: they would end up in messages.
    pub(super) fn parse(text: &str) -> Option<Url> {
        let (secure, rest) = match text.split_once("://")? {
            ("https", rest) => (true, rest),
            ("http", rest) => (false, rest),
            _ => return None,
        };
        let rest = rest.split('#').next()?;
        // What comes off the wire goes onto it again; nothing may end the line that it is put on.
        if rest.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return None;
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at_checked(end)?;
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        let (host, port) = split_port(authority)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':');
        // (Hosts have folders of certificates, and `..` is none.)
        if host.is_empty() || host.starts_with('.') || !host.bytes().all(plain) {
            return None;
        }
        let port = port.unwrap_or(if secure { 443 } else { 80 });
        Some(Url { secure, host: host.to_owned(), port, target })
    }

    /// What `location`, in an answer to a request for this URL, stands for (RFC 9110 §10.2.2).
    pub(super) fn join(&self, location: &str) -> Option<Url> {
        if location.contains("://") {
            return Url::parse(location);
        }
        if let Some(rest) = location.strip_prefix("//") {
            return Url::parse(&format!("{}://{rest}", self.scheme()));
        }
        let target = if location.starts_with('/') {
            location.to_owned()
        } else {
            let path = self.target.split('?').next()?;
            format!("{}{location}", path.get(..=path.rfind('/')?)?)
        };
        Url::parse(&format!("{}{target}", self.origin()))
    }

    /// The same server's `target`.
    pub(super) fn at(&self, target: impl Into<String>) -> Url {
        Url { target: target.into(), ..self.clone() }
    }

    /// With one more parameter.
    pub(super) fn with_query(&self, key: &str, value: &str) -> Url {
        let separator = if self.target.contains('?') { '&' } else { '?' };
        self.at(format!("{}{separator}{key}={}", self.target, encode(value)))
    }

    pub(super) fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    /// Host and port, as the `Host` field has them.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.secure, self.port) {
            (true, 443) | (false, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    /// Scheme, host and port.
    pub(super) fn origin(&self) -> String {
        format!("{}://{}", self.scheme(), self.authority())
    }

    pub(super) fn has_origin_of(&self, other: &Url) -> bool {
        (self.secure, &self.host, self.port) == (other.secure, &other.host, other.port)
    }

    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

impl fmt::Display for Url {
    /// Without the query, in which there may be secrets.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.target.split('?').next().unwrap_or_default();
        write!(formatter, "{}{path}", self.origin())
    }
}

/// Host and port of `host`, `host:port`, `[address]` or `[address]:port`.
pub(super) fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest)
        }
        None => match authority.find(':') {
            Some(at) => authority.split_at_checked(at)?,
            None => (authority, ""),
        },
    };
    match port.strip_prefix(':') {
        Some(port) => Some((host, Some(port.parse().ok()?))),
        None if port.is_empty() => Some((host, None)),
        None => None,
    }
}

/// Whether a host name or address means this machine and cannot mean another.
pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Percent-encodes a query's value (RFC 3986 §2.3).
pub(super) fn encode(value: &str) -> String {
    let mut encoded = String::new();
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_is_taken_apart_and_put_together() {
        for (text, origin, target) in [
            ("https://host/v2/", "https://host", "/v2/"),
            ("http://127.0.0.1:5000/v2/?a=b#c", "http://127.0.0.1:5000", "/v2/?a=b"),
            ("https://[::1]:5000", "https://[::1]:5000", "/"),
            ("https://host?x=1", "https://host", "/?x=1"),
            ("http://host:80/", "http://host", "/"),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!((url.origin().as_str(), url.target.as_str()), (origin, target), "{text}");
        }
        let bad = [
            "",
            "https://../",
            "ftp://a/",
            "https://",
            "https://a:b@c/",
            "https://a:99999/",
            "http://a b/",
            "http://a\r\n/",
        ];
        for text in bad {
            assert_eq!(Url::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn location_is_resolved_against_the_request() {
        let base = Url::parse("https://host:1/v2/app/blobs/uploads/?x=1").unwrap();
        for (location, expected) in [
            ("http://other/a", "http://other/a"),
            ("//other/a", "https://other/a"),
            ("/v2/x?y", "https://host:1/v2/x?y"),
            ("abc?z", "https://host:1/v2/app/blobs/uploads/abc?z"),
        ] {
            let url = base.join(location).unwrap();
            assert_eq!(format!("{}{}", url.origin(), url.target), expected, "{location}");
        }
    }

    #[test]
    fn loopback_is_only_what_cannot_be_elsewhere() {
        assert!(["localhost", "127.0.0.1", "127.9.9.9", "::1"].iter().all(|host| is_loopback(host)));
        assert!(!["localhost.example", "10.0.0.1", "127.0.0.1.example"].iter().any(|host| is_loopback(host)));
    }
}
