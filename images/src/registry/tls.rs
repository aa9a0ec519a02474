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
        let anyone = Arc::new(Unchecked { provider, accepted: true });
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
    if roots.is_empty() {
        let nobody = Arc::new(Unchecked { provider, accepted: false });
        return Ok(builder.dangerous().with_custom_certificate_verifier(nobody).with_no_client_auth());
    }
    let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| bad(Error::Other(OtherError(Arc::new(error)))))?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Named { webpki, named }));
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

/// Verifies as usual, and accepts a server's own certificate if the host's folder has that very one: people make
/// self-signed certificates with `openssl req -x509`, which are authorities by form and so no server's for webpki.
#[derive(Debug)]
struct Named {
    webpki: Arc<WebPkiServerVerifier>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let usual =
            self.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match usual {
            Err(Error::InvalidCertificate(problem))
                if is_by_form(&problem) && self.named.contains(&end_entity.clone().into_owned()) =>
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
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Whether a certificate was refused for what it is, rather than for its dates, its names or a revocation.
fn is_by_form(problem: &CertificateError) -> bool {
    matches!(problem, CertificateError::Other(_) | CertificateError::UnknownIssuer)
}

/// Accepts any certificate, or none where there are no authorities to check one by.
#[derive(Debug)]
struct Unchecked {
    provider: Arc<CryptoProvider>,
    accepted: bool,
}

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.accepted {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::General(
            "this machine has no certificate authorities; install ca-certificates, or put the registry's into \
             /etc/docker/certs.d/HOST:PORT/ca.crt"
                .into(),
        ))
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
