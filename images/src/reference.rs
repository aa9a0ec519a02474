//! Image names, normalised exactly as Docker does (grammar: `github.com/distribution/reference`).
//!
//! `busybox` means `docker.io/library/busybox:latest`. A name is a registry's domain, a path, and a tag or a digest
//! or both. What stands before the first `/` is a domain if it has a dot or a colon, or is `localhost`, or has
//! upper-case letters; otherwise the domain is `docker.io`, where single-component paths live under `library/`.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

const DEFAULT_DOMAIN: &str = "docker.io";
/// The name by which Docker's registry went once, and which old tools still write.
const LEGACY_DOMAIN: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A full image name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is not an image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// It does not follow the grammar.
    #[error("{0:?} is not an image name; names look like [REGISTRY/]NAME[:TAG][@sha256:DIGEST]")]
    Syntax(String),
    /// Repository names have no upper-case letters.
    #[error("{0:?} is not an image name: the repository must be in lower case")]
    UpperCase(String),
    /// It is longer than registries accept.
    #[error("{0:?}… is not an image name: it is longer than {MAX_NAME} characters")]
    TooLong(String),
    /// 64 hexadecimal digits are an image ID.
    #[error("{0} is an image ID, which cannot be an image's name")]
    Identifier(String),
}

impl Reference {
    /// Domain and path: `docker.io/library/busybox`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The registry's host, and port if any.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The path within the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag; a name with neither tag nor digest has the tag `latest`.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, if the name has one.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The repository as people write it: `busybox`, `user/app`, `quay.io/app`.
    pub fn short_repository(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        match self.path.strip_prefix(OFFICIAL) {
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            _ => self.path.clone(),
        }
    }

    /// The name as people write it, with its tag: `busybox:latest`.
    pub fn short(&self) -> String {
        let mut name = self.short_repository();
        self.push_suffix(&mut name);
        name
    }

    /// The same repository with another tag, and no digest.
    pub fn with_tag(&self, tag: &str) -> Result<Reference, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Syntax(tag.to_owned()));
        }
        Ok(Reference { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    fn push_suffix(&self, name: &mut String) {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
    }
}

impl fmt::Display for Reference {
    /// The full name, from which the same reference is parsed again.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = self.repository();
        self.push_suffix(&mut name);
        formatter.write_str(&name)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        if Digest::from_hex(text).is_some() {
            return Err(ReferenceError::Identifier(text.to_owned()));
        }
        // Longer than any name with a tag and a digest; also keeps messages short.
        if text.len() > 1024 {
            return Err(ReferenceError::TooLong(text.chars().take(MAX_NAME).collect()));
        }
        let syntax = || ReferenceError::Syntax(text.to_owned());
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|_| syntax())?)),
            None => (text, None),
        };
        // A colon before a slash is a port's.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        let (domain, path) = split_domain(name);
        if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(ReferenceError::UpperCase(text.to_owned()));
        }
        if !is_domain(&domain) || !path.split('/').all(is_path_component) || !tag.is_none_or(is_tag) {
            return Err(syntax());
        }
        if domain.len() + 1 + path.len() > MAX_NAME {
            return Err(ReferenceError::TooLong(text.chars().take(MAX_NAME).collect()));
        }
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Reference { domain, path, tag: tag.map(str::to_owned), digest })
    }
}

fn split_domain(name: &str) -> (String, String) {
    let (domain, path) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, name),
    };
    let domain = if domain == LEGACY_DOMAIN { DEFAULT_DOMAIN } else { domain };
    if domain == DEFAULT_DOMAIN && !path.contains('/') {
        (domain.to_owned(), format!("{OFFICIAL}{path}"))
    } else {
        (domain.to_owned(), path.to_owned())
    }
}

/// A host name, an IPv4 address or a bracketed IPv6 address, and a port.
fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (domain, None),
    };
    let host_is_valid = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':'),
        None => host.split('.').all(is_domain_component),
    };
    host_is_valid && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

fn is_domain_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

/// Runs of lower-case letters and digits, separated by `.`, `_`, `__` or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let separators: Vec<&str> =
        component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).collect();
    match separators.as_slice() {
        // Nothing before the first letter, nothing after the last.
        ["", between @ .., ""] => between.iter().all(|separator| {
            matches!(*separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')
        }),
        _ => false,
    }
}

fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn full(text: &str) -> Result<String, ReferenceError> {
        text.parse::<Reference>().map(|reference| reference.to_string())
    }

    #[test]
    fn short_name_is_completed_as_docker_does() {
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("quay.io/a/b/c", "quay.io/a/b/c:latest"),
            ("HOST/app", "HOST/app:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("a--b/c__d.e", "docker.io/a--b/c__d.e:latest"),
        ] {
            assert_eq!(full(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn name_with_digest_has_no_default_tag() {
        let name = format!("busybox@sha256:{HEX}");
        assert_eq!(full(&name), Ok(format!("docker.io/library/busybox@sha256:{HEX}")));
        let both = format!("busybox:1@sha256:{HEX}");
        assert_eq!(full(&both), Ok(format!("docker.io/library/busybox:1@sha256:{HEX}")));
    }

    #[test]
    fn short_form_drops_what_is_implied() {
        let short = |text: &str| text.parse::<Reference>().map(|reference| reference.short());
        assert_eq!(short("docker.io/library/busybox:latest").as_deref(), Ok("busybox:latest"));
        assert_eq!(short("docker.io/user/app:v1").as_deref(), Ok("user/app:v1"));
        assert_eq!(short("docker.io/library/a/b").as_deref(), Ok("library/a/b:latest"));
        assert_eq!(short("quay.io/app").as_deref(), Ok("quay.io/app:latest"));
    }

    #[test]
    fn text_that_is_no_name_is_refused() {
        let bad = [
            "",
            ":",
            "a:",
            "a:-b",
            "/a",
            "a/",
            "a//b",
            "-a",
            "a-",
            "a._b",
            "a..b",
            "a___b",
            "a b",
            "a@b",
            "é",
            "a@sha256:12",
            "-host.io/a",
            "host.io:port/a",
            "../a",
        ];
        for text in bad {
            assert!(matches!(full(text), Err(ReferenceError::Syntax(_))), "{text:?}: {:?}", full(text));
        }
        assert!(matches!(full("Busybox"), Err(ReferenceError::UpperCase(_))));
        assert!(matches!(full(HEX), Err(ReferenceError::Identifier(_))));
        assert!(matches!(full(&"a".repeat(250)), Err(ReferenceError::TooLong(_))));
    }
}
