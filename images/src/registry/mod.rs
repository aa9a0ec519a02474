//! Registries: a client of the OCI distribution API, and what to do with it.
//!
//! ```text
//!  pull, push ──▶ client ──▶ auth ──▶ http ──▶ wire (TCP, TLS, patience)
//!     what travels   the API    401      HTTP/1.1
//! ```
//!
//! A registry is not trusted: what it sends is checked against digests that come from the image's name or from what
//! was checked before, and every answer is bounded in size and time.

mod auth;
mod base64;
mod client;
mod credentials;
mod download;
mod fetch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod http;
mod listing;
mod mirror;
mod proxy;
mod pull;
mod push;
mod tls;
mod url;
mod wire;

pub use client::{RegistryError, RegistryOptions, Repository};
pub use credentials::{CredentialError, CredentialStore, Credentials};
pub use fetch::{FetchError, fetch};
pub use http::HttpError;
pub use listing::{Found, SearchError, search};
pub use mirror::{MirrorError, Mirrors};
pub use proxy::{Proxies, ProxyError};
pub use pull::{PullError, Pulled, Step, Transfer};
pub use push::{PushError, Pushed};
pub use tls::TlsError;
pub use wire::Patience;
