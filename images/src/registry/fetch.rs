//! One file by its URL, for `ADD`.

use std::fs::File;
use std::io::{self, Read};

use super::http::{Http, HttpError, Request};
use super::proxy::{Proxies, ProxyError};
use super::url::Url;
use super::wire::Patience;
use crate::bounded::{Bounded, too_large};
use crate::limits::MAX_LAYER_BYTES;

/// Why a file was not fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// It is no URL.
    #[error("{0:?} is no URL of http or https")]
    Url(String),
    /// The environment names a proxy that cannot be used.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The server cannot be spoken with.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The server does not give it out.
    #[error("{url} answered with status {status}")]
    Status {
        /// Who answered.
        url: String,
        /// What.
        status: u16,
    },
    /// It broke off, or cannot be stored.
    #[error("fetching {url} broke off")]
    Body {
        /// From where.
        url: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Fetches a file into `output`. Returns the field `Last-Modified`, if there is one. Servers on this machine may do
/// without encryption, others never.
pub fn fetch(url: &str, output: File) -> Result<Option<String>, FetchError> {
    let parsed = Url::parse(url).ok_or_else(|| FetchError::Url(url.chars().take(200).collect()))?;
    let http = Http::new(Patience::default(), true, Proxies::of_environment()?);
    let mut response = http.send(Request::new("GET", parsed))?;
    let whence = response.url.to_string();
    if response.status != 200 {
        return Err(FetchError::Status { url: whence, status: response.status });
    }
    let broken = |source| FetchError::Body { url: whence.clone(), source };
    let length = response.length();
    if length.is_some_and(|length| length > MAX_LAYER_BYTES) {
        return Err(broken(too_large()));
    }
    let mut output = Bounded::new(output);
    let copied = io::copy(&mut response.body.by_ref(), &mut output).map_err(broken)?;
    if length.is_some_and(|length| length != copied) {
        return Err(broken(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(response.field("last-modified").map(str::to_owned))
}
