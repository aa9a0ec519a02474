//! One repository of a registry, over the OCI distribution API (distribution-spec: spec.md#endpoints).

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use super::auth::{self, Challenge};
use super::credentials::{CredentialError, CredentialStore, Credentials};
use super::http::{Body, Http, HttpError, Request, Response};
use super::mirror::{Mirror, Mirrors};
use super::proxy::Proxies;
use super::url::Url;
use super::wire::Patience;
use crate::digest::Digest;
use crate::limits::MAX_MANIFEST_BYTES;
use crate::reference::Reference;

/// Where Docker's own registry is served.
const DOCKER_HOST: &str = "registry-1.docker.io";
const MAX_ERROR_BYTES: u64 = 16 << 10;
/// What is repeated when a server says that it cannot now.
const RETRIES: u32 = 3;
/// No pause is longer, whatever a server asks for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// The forms of manifests and indexes that are understood, the preferred ones first.
pub(super) const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// How to speak with registries.
#[derive(Debug, Default)]
pub struct RegistryOptions {
    /// A registry on this machine may speak plain HTTP or have any certificate. For others this changes nothing.
    pub trust_loopback: bool,
    /// How long to wait for what.
    pub patience: Patience,
    /// Who we are; none for anonymous.
    pub credentials: Option<CredentialStore>,
    /// Through which machines others are reached.
    pub proxies: Proxies,
    /// Who else serves what a registry has.
    pub mirrors: Mirrors,
}

/// Why a registry did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// It could not be asked.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The user's credentials could not be read.
    #[error(transparent)]
    CredentialStore(#[from] CredentialError),
    /// It has no such image.
    #[error("{registry} has no {what}")]
    NotFound {
        /// Its host.
        registry: String,
        /// The image.
        what: String,
    },
    /// It does not tell strangers.
    #[error(
        "{registry} asks who you are, or has no such repository; `cloche login {registry}` if you have an account"
    )]
    LoginNeeded {
        /// Its host.
        registry: String,
    },
    /// It does not know us.
    #[error("{registry} refuses your credentials; `cloche login {registry}` again")]
    Credentials {
        /// Its host.
        registry: String,
    },
    /// It asks for authentication in a way that is not known.
    #[error("{registry} asks for authentication in no way that is known here (Basic and Bearer are)")]
    Challenge {
        /// Its host.
        registry: String,
    },
    /// It sends us elsewhere for a token, and that place is not safe.
    #[error("tokens are to come from {realm:?}, which is no https URL; no credentials are sent there")]
    Realm {
        /// The URL.
        realm: String,
    },
    /// It refused, or is out of order.
    #[error("{url} answered {status} when asked for {what}{message}")]
    Status {
        /// Who.
        url: String,
        /// For what it was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// What it said, preceded by a colon.
        message: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// It said something that cannot be.
    #[error("{url} gave a wrong answer: {problem}")]
    Answer {
        /// Who.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// What came is not what was asked for.
    #[error("{url} sent something with the digest {actual} for {expected}; nothing of it was kept")]
    Digest {
        /// Who.
        url: String,
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
}

impl RegistryError {
    /// The error that an answer stands for.
    pub(super) fn status(what: impl Into<String>, response: Response<'_>) -> RegistryError {
        let (url, status) = (response.url.to_string(), response.status);
        // RFC 9110 §10.2.3; a date instead, which registries do not send, is not looked at.
        let retry_after =
            response.field("retry-after").and_then(|text| text.parse().ok()).map(Duration::from_secs);
        let content = response.read(MAX_ERROR_BYTES).unwrap_or_default();
        RegistryError::Status { url, what: what.into(), status, message: message_in(&content), retry_after }
    }

    /// How long to wait before asking again: as long as was asked for, but no shorter than `own`, so that who says
    /// `Retry-After: 0` is not asked without a pause.
    pub(super) fn pause(&self, own: Duration) -> Duration {
        let asked = match self {
            RegistryError::Status { retry_after, .. } => *retry_after,
            _ => None,
        };
        asked.map_or(own, |asked| asked.max(own)).min(MAX_RETRY_AFTER)
    }

    /// Whether asking again may help.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            // What is no HTTP is so the next time too, and who has waited once has waited enough.
            RegistryError::Http(HttpError::Exchange { source, .. }) => !matches!(
                source.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::Other | io::ErrorKind::TimedOut
            ),
            RegistryError::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

/// What a registry says of an error (distribution-spec: spec.md#error-codes), fit for a terminal.
pub(super) fn message_in(content: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Answer {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let entry =
        serde_json::from_slice::<Answer>(content).ok().and_then(|answer| answer.errors.into_iter().next());
    let Some(Entry { code, message }) = entry else { return String::new() };
    let said = if message.is_empty() { code } else { message };
    let said: String = said.chars().take(300).map(|c| if c.is_control() { '·' } else { c }).collect();
    if said.is_empty() { said } else { format!(": {said}") }
}

/// A manifest or index as a registry has it.
#[derive(Debug)]
pub(super) struct RemoteManifest {
    pub(super) content: Vec<u8>,
    pub(super) digest: Digest,
    pub(super) media_type: Option<String>,
}

/// One repository.
#[derive(Debug)]
pub struct Repository {
    http: Http,
    base: Url,
    domain: String,
    path: String,
    credentials: Option<Credentials>,
    scopes: Vec<String>,
    authorization: Mutex<Option<String>>,
}

impl Repository {
    /// Reaches out for the repository of an image. `push` asks for the right to write.
    pub fn open(
        reference: &Reference,
        push: bool,
        options: &RegistryOptions,
    ) -> Result<Repository, RegistryError> {
        let domain = reference.domain().to_owned();
        let host = if domain == "docker.io" { DOCKER_HOST } else { domain.as_str() };
        let base = Url::parse(&format!("https://{host}/v2/")).ok_or_else(|| RegistryError::Answer {
            url: domain.clone(),
            problem: "it is no host".to_owned(),
        })?;
        let actions = if push { "pull,push" } else { "pull" };
        let mut repository =
            Repository::at(base, domain, reference.path(), actions, options.trust_loopback, options)?;
        repository.find_scheme();
        Ok(repository)
    }

    /// The same repository of a mirror, to pull from.
    pub(super) fn open_mirror(
        reference: &Reference,
        mirror: &Mirror,
        options: &RegistryOptions,
    ) -> Result<Repository, RegistryError> {
        let base = mirror.0.at("/v2/");
        // Who names a mirror on this machine by `http:` wants no encryption there.
        let trust_loopback = options.trust_loopback || !base.secure;
        Repository::at(base, mirror.0.authority(), reference.path(), "pull", trust_loopback, options)
    }

    /// At a server that is known as `domain`, also to the store of credentials.
    fn at(
        base: Url,
        domain: String,
        path: &str,
        actions: &str,
        trust_loopback: bool,
        options: &RegistryOptions,
    ) -> Result<Repository, RegistryError> {
        let store = options.credentials.as_ref();
        let credentials = store.map(|store| store.get(&domain)).transpose()?.flatten();
        Ok(Repository {
            http: Http::new(options.patience.clone(), trust_loopback, options.proxies.clone()),
            base,
            scopes: vec![format!("repository:{path}:{actions}")],
            path: path.to_owned(),
            domain,
            credentials,
            authorization: Mutex::default(),
        })
    }

    /// The same as `user`, whatever is known of the registry; for `login`.
    pub fn open_as(
        reference: &Reference,
        user: &str,
        password: &str,
        options: &RegistryOptions,
    ) -> Result<Repository, RegistryError> {
        let anonymous = RegistryOptions {
            trust_loopback: options.trust_loopback,
            patience: options.patience.clone(),
            credentials: None,
            proxies: options.proxies.clone(),
            mirrors: Mirrors::default(),
        };
        let mut repository = Repository::open(reference, false, &anonymous)?;
        // A token for nothing in particular proves it as well, and there is no repository to ask for.
        repository.scopes.clear();
        let (user, password) = (user.to_owned(), password.to_owned());
        repository.credentials = Some(Credentials::Password { user, password });
        Ok(repository)
    }

    /// For what concerns the whole registry of an image, with this scope.
    pub(super) fn open_registry(
        reference: &Reference,
        scope: &str,
        options: &RegistryOptions,
    ) -> Result<Repository, RegistryError> {
        let mut repository = Repository::open(reference, false, options)?;
        repository.scopes = vec![scope.to_owned()];
        Ok(repository)
    }

    /// On this machine, and only there and if that was allowed, a registry may do without TLS.
    fn find_scheme(&mut self) {
        if !self.http.trusts(&self.base) {
            return;
        }
        let probed = self.http.send(Request::new("GET", self.base.clone()));
        if let Err(HttpError::Connect { source, .. }) = probed
            && matches!(
                source.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            )
        {
            // A port that was implied stays what it is for https, as in Docker.
            self.base.secure = false;
        }
    }

    /// The registry's domain, as in image names.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository's path in the registry.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// `/v2/`
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// Also asks for the right to read another repository of the registry, from which blobs may be taken over.
    pub(super) fn also_read(&mut self, path: &str) {
        let scope = format!("repository:{path}:pull");
        if !self.scopes.contains(&scope) {
            self.scopes.push(scope);
        }
    }

    pub(super) fn patience(&self) -> &Patience {
        self.http.patience()
    }

    /// `/v2/REPOSITORY/rest`
    pub(super) fn url(&self, rest: &str) -> Url {
        self.base.at(format!("/v2/{}/{rest}", self.path))
    }

    /// Sends what `attempt` makes of a value for `Authorization`, and once more if that was missing or too old.
    pub(super) fn authorized<'h>(
        &'h self,
        mut attempt: impl FnMut(&'h Http, Option<String>) -> Result<Response<'h>, HttpError>,
    ) -> Result<Response<'h>, RegistryError> {
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let response = attempt(&self.http, known.clone())?;
        if response.status != 401 {
            return Ok(response);
        }
        let fresh = self.authorize(&response, known.as_deref())?;
        drop(response);
        let response = attempt(&self.http, Some(fresh))?;
        match response.status {
            401 => Err(self.refused()),
            _ => Ok(response),
        }
    }

    fn authorize(&self, response: &Response<'_>, known: Option<&str>) -> Result<String, RegistryError> {
        // Threads that were refused at the same time ask for one token, not for one each.
        let mut authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(newer) = authorization.as_deref().filter(|value| Some(*value) != known) {
            return Ok(newer.to_owned());
        }
        // A redirect's target is not asked who we are.
        if !response.url.has_origin_of(&self.base) {
            return Err(RegistryError::Challenge { registry: response.url.authority() });
        }
        let challenge = Challenge::choose(response.all("www-authenticate"))
            .ok_or_else(|| RegistryError::Challenge { registry: self.domain.clone() })?;
        if challenge == Challenge::Basic && known.is_some() {
            return Err(self.refused());
        }
        let fresh =
            auth::answer(&self.http, challenge, &self.scopes, self.credentials.as_ref(), &self.domain)?;
        *authorization = Some(fresh.clone());
        Ok(fresh)
    }

    fn refused(&self) -> RegistryError {
        let registry = self.domain.clone();
        match self.credentials {
            Some(_) => RegistryError::Credentials { registry },
            None => RegistryError::LoginNeeded { registry },
        }
    }

    /// A request without a body.
    pub(super) fn ask(
        &self,
        method: &'static str,
        url: &Url,
        fields: &[(&'static str, String)],
    ) -> Result<Response<'_>, RegistryError> {
        self.authorized(|http, authorization| {
            let mut request = Request::new(method, url.clone());
            request.fields.extend(fields.iter().cloned());
            request.fields.extend(authorization.map(|value| ("Authorization", value)));
            http.send(request)
        })
    }

    /// Does something again, some times and ever later, while the registry says that it cannot now.
    pub(super) fn patiently<T>(
        &self,
        mut action: impl FnMut() -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut pause = self.patience().retry;
        for _ in 0..RETRIES {
            match action() {
                Err(error) if error.is_passing() => thread::sleep(error.pause(pause)),
                result => return result,
            }
            pause *= 2;
        }
        action()
    }

    /// Whether the registry knows us; for `login`.
    pub fn greet(&self) -> Result<(), RegistryError> {
        self.patiently(|| {
            let response = self.ask("GET", &self.base, &[])?;
            match response.status {
                200 => Ok(()),
                _ => Err(RegistryError::status("its version", response)),
            }
        })
    }

    /// The manifest or index under a tag or a digest.
    pub(super) fn manifest(&self, name: &str) -> Result<RemoteManifest, RegistryError> {
        let url = self.url(&format!("manifests/{name}"));
        let accept = [("Accept", MANIFEST_TYPES.to_owned())];
        self.patiently(|| {
            let response = self.ask("GET", &url, &accept)?;
            match response.status {
                200 => {}
                404 => return Err(self.not_found(name)),
                _ => return Err(RegistryError::status(name, response)),
            }
            let asked = name.parse::<Digest>().ok();
            let told =
                response.field("docker-content-digest").and_then(|digest| digest.parse::<Digest>().ok());
            let media_type = response.field("content-type").map(str::to_owned);
            let from = response.url.to_string();
            let content = response.read(MAX_MANIFEST_BYTES)?;
            let actual = Digest::of(&content);
            match asked.or(told) {
                Some(expected) if expected != actual => {
                    Err(RegistryError::Digest { url: from, expected, actual })
                }
                _ => Ok(RemoteManifest { content, digest: actual, media_type }),
            }
        })
    }

    fn not_found(&self, name: &str) -> RegistryError {
        let separator = if name.contains(':') { '@' } else { ':' };
        let what = format!("{}{separator}{name}", self.path);
        RegistryError::NotFound { registry: self.domain.clone(), what }
    }

    /// A small blob, whole.
    pub(super) fn small_blob(
        &self,
        digest: Digest,
        bytes: u64,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let url = self.url(&format!("blobs/{digest}"));
        let wrong = |url: String, problem| Err(RegistryError::Answer { url, problem });
        if bytes > limit {
            return wrong(
                url.to_string(),
                format!("a file of {bytes} bytes, where at most {limit} are accepted"),
            );
        }
        self.patiently(|| {
            let response = self.ask("GET", &url, &[])?;
            match response.status {
                200 => {}
                404 => return Err(self.not_found(&digest.to_string())),
                _ => return Err(RegistryError::status(digest.to_string(), response)),
            }
            let from = response.url.to_string();
            if let Some(length) = response.length().filter(|length| *length != bytes) {
                return wrong(from, format!("{digest} would have {length} bytes, expected were {bytes}"));
            }
            let content = response.read(bytes)?;
            let actual = Digest::of(&content);
            if actual != digest {
                return Err(RegistryError::Digest { url: from, expected: digest, actual });
            }
            Ok(content)
        })
    }

    /// Whether the registry has a blob.
    pub(super) fn has_blob(&self, digest: Digest) -> Result<bool, RegistryError> {
        let url = self.url(&format!("blobs/{digest}"));
        self.patiently(|| {
            let response = self.ask("HEAD", &url, &[])?;
            match response.status {
                200 => Ok(true),
                404 => Ok(false),
                _ => Err(RegistryError::status(digest.to_string(), response)),
            }
        })
    }

    /// Stores a manifest under a tag or its digest.
    pub(super) fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        content: &[u8],
    ) -> Result<(), RegistryError> {
        let url = self.url(&format!("manifests/{name}"));
        self.patiently(|| {
            let response = self.authorized(|http, authorization| {
                let mut request = Request::new("PUT", url.clone()).field("Content-Type", media_type);
                request.fields.extend(authorization.map(|value| ("Authorization", value)));
                request.body = Body::Bytes(content);
                http.send(request)
            })?;
            match response.status {
                200..=202 => Ok(()),
                _ => Err(RegistryError::status(format!("taking {name}"), response)),
            }
        })
    }

    /// Starts an upload, or takes a blob over from another repository; then there is no place to send it to.
    pub(super) fn start_upload(
        &self,
        digest: Digest,
        from: Option<&str>,
    ) -> Result<Option<Url>, RegistryError> {
        let mut url = self.url("blobs/uploads/");
        if let Some(from) = from {
            url = url.with_query("mount", &digest.to_string()).with_query("from", from);
        }
        let response = self.ask("POST", &url, &[])?;
        match response.status {
            201 => Ok(None),
            202 => {
                let location = response.field("location").and_then(|location| response.url.join(location));
                location.map(Some).ok_or_else(|| RegistryError::Answer {
                    url: response.url.to_string(),
                    problem: "an upload without a place for it".to_owned(),
                })
            }
            _ => Err(RegistryError::status(format!("taking {digest}"), response)),
        }
    }

    /// Sends a blob in one piece to where an upload was started.
    pub(super) fn finish_upload<'a>(
        &self,
        to: &Url,
        digest: Digest,
        bytes: u64,
        open: impl Fn() -> io::Result<Box<dyn Read + 'a>>,
    ) -> Result<(), RegistryError> {
        let url = to.with_query("digest", &digest.to_string());
        let is_ours = url.has_origin_of(&self.base);
        let response = self.authorized(|http, authorization| {
            let failed = |source| HttpError::Exchange { method: "PUT", url: url.to_string(), source };
            let mut reader = open().map_err(failed)?;
            let mut request =
                Request::new("PUT", url.clone()).field("Content-Type", "application/octet-stream");
            request.fields.extend(authorization.filter(|_| is_ours).map(|value| ("Authorization", value)));
            request.body = Body::Stream { reader: &mut reader, bytes };
            http.send(request)
        })?;
        match response.status {
            201 | 204 => Ok(()),
            _ => Err(RegistryError::status(format!("taking {digest}"), response)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_short_and_has_no_control_characters() {
        let told = message_in(br#"{"errors":[{"code":"DENIED","message":"a\u001b[31mb\nc"}]}"#);
        assert_eq!(told, ": a·[31mb·c");
        assert_eq!(message_in(br#"{"errors":[{"code":"DENIED"}]}"#), ": DENIED");
        for nothing in ["", "{}", "<html>", r#"{"errors":[]}"#] {
            assert_eq!(message_in(nothing.as_bytes()), "");
        }
    }
    #[test]
    fn pause_is_the_longer_of_ours_and_theirs_up_to_a_bound() {
        let pause = |retry_after: Option<u64>| {
            let error = RegistryError::Status {
                url: String::new(),
                what: String::new(),
                status: 429,
                message: String::new(),
                retry_after: retry_after.map(Duration::from_secs),
            };
            error.pause(Duration::from_secs(2)).as_secs()
        };
        assert_eq!([None, Some(0), Some(1), Some(5), Some(3600)].map(pause), [2, 2, 2, 5, 10]);
    }
}
