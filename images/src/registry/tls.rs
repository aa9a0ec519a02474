//! Whom to trust: the system's certificate authorities, and those that Docker's and Podman's folders name for a host.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

/// Where distributions keep the certificate authorities that they trust; `SSL_CERT_FILE` goes before all.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// One folder for each host in these: `*.crt` are authorities, `*.cert` with `*.key` is who we are.
const HOST_FOLDERS: [&str; 2] = ["/etc/docker/certs.d", "/etc/containers/certs.d"];

/// Why no encrypted connection can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate or key is unreadable.
    #[error("cannot use the certificates in {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Certificate and key do not go together, or such.
    #[error("cannot set up TLS for {host}")]
    Config {
        /// Host and port.
        host: String,
        /// Why.
        #[source]
        source: Error,
    },
}

/// How to speak TLS with a host. Without `verify` any certificate will do, which is for this machine only.
pub(super) fn config(host: &str, verify: bool) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let bad = |source| TlsError::Config { host: host.to_owned(), source };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(bad)?;
    if !verify {
        let anyone = Arc::new(Verifier { provider, trust: Trust::Anyone });
        return Ok(builder.dangerous().with_custom_certificate_verifier(anyone).with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    if let Some(bundle) = system_bundle() {
        roots.add_parsable_certificates(certificates(&bundle)?);
    }
    let mut named = Vec::new();
    let mut identity = None;
    for folder in host_folders(host) {
        for path in sorted(&folder) {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => named.extend(certificates(&path)?),
                Some("cert") => identity = Some((certificates(&path)?, key(&path.with_extension("key"))?)),
                _ => {}
            }
        }
    }
    roots.add_parsable_certificates(named.iter().cloned());
    let trust = if roots.is_empty() {
        Trust::Nobody
    } else {
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| bad(Error::Other(OtherError(Arc::new(error)))))?;
        Trust::Authorities { webpki, named }
    };
    let verifier = Arc::new(Verifier { provider, trust });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(bad),
        None => Ok(builder.with_no_client_auth()),
    }
}

fn system_bundle() -> Option<PathBuf> {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    named.or_else(|| SYSTEM_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file()))
}

fn host_folders(host: &str) -> Vec<PathBuf> {
    let own = std::env::var_os("HOME").map(|home| Path::new(&home).join(".config/containers/certs.d"));
    HOST_FOLDERS.iter().map(PathBuf::from).chain(own).map(|folder| folder.join(host)).collect()
}

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |source| TlsError::File { path: path.to_owned(), source };
    let content = fs::read(path).map_err(bad)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
    found.map_err(|error| bad(io::Error::other(error)))
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bad = |source| TlsError::File { path: path.to_owned(), source };
    let content = fs::read(path).map_err(bad)?;
    PrivateKeyDer::from_pem_slice(&content).map_err(|error| bad(io::Error::other(error)))
}

/// Checks a server's certificate as far as `trust` says; its signatures in any case.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Trust,
}

#[derive(Debug)]
enum Trust {
    /// Any certificate.
    Anyone,
    /// None: there are no authorities to check one by.
    Nobody,
    /// As usual, and a server's own certificate if the host's folder has that very one: people make self-signed
    /// certificates with `openssl req -x509`, which are authorities by form and so no server's for webpki.
    Authorities { webpki: Arc<WebPkiServerVerifier>, named: Vec<CertificateDer<'static>> },
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (webpki, named) = match &self.trust {
            Trust::Anyone => return Ok(ServerCertVerified::assertion()),
            Trust::Nobody => {
                return Err(Error::General(
                    "this machine has no certificate authorities; install ca-certificates, or put the registry's \
                     into /etc/docker/certs.d/HOST:PORT/ca.crt"
                        .into(),
                ));
            }
            Trust::Authorities { webpki, named } => (webpki, named),
        };
        match webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(problem))
                if is_by_form(&problem) && named.contains(&end_entity.clone().into_owned()) =>
            {
                rustls::client::verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a certificate was refused for what it is, rather than for its dates, its names or a revocation.
fn is_by_form(problem: &CertificateError) -> bool {
    matches!(problem, CertificateError::Other(_) | CertificateError::UnknownIssuer)
}
