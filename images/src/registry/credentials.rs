//! Who we are to which registry: Docker's `config.json` and its credential helpers, read and written so that `docker`
//! and this program see each other's logins.
//!
//! ```json
//! { "auths": { "HOST": { "auth": "base64(user:password)" } }, "credsStore": "NAME", "credHelpers": { "HOST": "NAME" } }
//! ```
//!
//! A helper is the program `docker-credential-NAME`; it is asked with `get`, `store` or `erase`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};

use super::base64;

/// Docker's name for its own registry.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// The user name under which helpers keep what is no password but a token.
const TOKEN_USER: &str = "<token>";
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user and a password.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A refresh token, for which the token server gives shorter-lived ones.
    IdentityToken(String),
}

/// Secrets stay out of logs.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Credentials::Password { user, .. } => write!(formatter, "the password of {user}"),
            Credentials::IdentityToken(_) => formatter.write_str("an identity token"),
        }
    }
}

/// Why credentials could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The file is unreadable, or cannot be written.
    #[error("cannot {action} {path}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not what Docker writes.
    #[error("{path} is malformed: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A helper cannot be run, or fails.
    #[error("the credential helper {helper} failed: {problem}")]
    Helper {
        /// The program.
        helper: String,
        /// What it said.
        problem: String,
    },
    /// There is no home directory to keep a file in.
    #[error("there is no place for credentials; set HOME or DOCKER_CONFIG")]
    NoHome,
}

/// Docker's configuration file.
#[derive(Debug)]
pub struct CredentialStore {
    path: PathBuf,
}

impl CredentialStore {
    /// The file that `docker` would use: in `$DOCKER_CONFIG`, or else in `~/.docker`.
    pub fn of_user() -> Result<CredentialStore, CredentialError> {
        let named = std::env::var_os("DOCKER_CONFIG").filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker"));
        let folder = named.or(home).ok_or(CredentialError::NoHome)?;
        Ok(CredentialStore::at(&folder.join("config.json")))
    }

    /// The file at `path`, which need not exist.
    pub fn at(path: &Path) -> CredentialStore {
        CredentialStore { path: path.to_owned() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known for a registry, given by its domain as in image names.
    pub fn get(&self, domain: &str) -> Result<Option<Credentials>, CredentialError> {
        let config = self.read()?;
        let key = key_of(domain);
        if let Some(helper) = helper_of(&config, key) {
            return ask(&helper, key);
        }
        let Some(Value::Object(auths)) = config.get("auths") else { return Ok(None) };
        // Docker has written keys in several forms over time. What it writes now is the latest.
        let older = || auths.iter().find(|(name, _)| key_of(host_of(name)) == key).map(|(_, entry)| entry);
        let entry = auths.get(key).or_else(older);
        entry.map_or(Ok(None), |entry| self.entry(entry))
    }

    fn entry(&self, entry: &Value) -> Result<Option<Credentials>, CredentialError> {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        if let Some(token) = text("identitytoken") {
            return Ok(Some(Credentials::IdentityToken(token.to_owned())));
        }
        if let Some(auth) = text("auth") {
            let decoded = base64::decode(auth).and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|pair| pair.split_once(':'));
            let (user, password) = pair.ok_or_else(|| CredentialError::Malformed {
                path: self.path.clone(),
                problem: "an `auth` is not the base64 of USER:PASSWORD".to_owned(),
            })?;
            let password = password.trim_end_matches('\0');
            return Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }));
        }
        Ok(text("username").zip(text("password")).map(|(user, password)| Credentials::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        }))
    }

    /// Keeps a password, where Docker would. Returns whether that is a file in which it stands all but open.
    pub fn put(&self, domain: &str, user: &str, password: &str) -> Result<bool, CredentialError> {
        let mut config = self.read()?;
        let key = key_of(domain);
        if let Some(helper) = helper_of(&config, key) {
            let entry = json!({ "ServerURL": key, "Username": user, "Secret": password });
            run_helper(&helper, "store", &entry.to_string())?;
            return Ok(false);
        }
        let auth = base64::encode(format!("{user}:{password}").as_bytes());
        let auths = config.entry("auths").or_insert_with(|| json!({}));
        let Value::Object(auths) = auths else { return Err(self.malformed("`auths` is no object")) };
        auths.retain(|name, _| key_of(host_of(name)) != key);
        auths.insert(key.to_owned(), json!({ "auth": auth }));
        self.write(&config)?;
        Ok(true)
    }

    /// Forgets a registry. Returns whether anything was known.
    pub fn remove(&self, domain: &str) -> Result<bool, CredentialError> {
        let mut config = self.read()?;
        let key = key_of(domain);
        if let Some(helper) = helper_of(&config, key) {
            let known = ask(&helper, key)?.is_some();
            if known {
                run_helper(&helper, "erase", key)?;
            }
            return Ok(known);
        }
        let Some(Value::Object(auths)) = config.get_mut("auths") else { return Ok(false) };
        let before = auths.len();
        auths.retain(|name, _| key_of(host_of(name)) != key);
        let known = auths.len() < before;
        if known {
            self.write(&config)?;
        }
        Ok(known)
    }

    fn read(&self) -> Result<Map<String, Value>, CredentialError> {
        let content = match crate::store::read_bounded(&self.path, MAX_CONFIG_BYTES) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
            Err(source) => {
                return Err(CredentialError::File { action: "read", path: self.path.clone(), source });
            }
        };
        if content.trim_ascii().is_empty() {
            return Ok(Map::new());
        }
        serde_json::from_slice(&content).map_err(|error| self.malformed(&error.to_string()))
    }

    /// Replaces the file in one step, readable by its owner only.
    fn write(&self, config: &Map<String, Value>) -> Result<(), CredentialError> {
        let failed = |source| CredentialError::File { action: "write", path: self.path.clone(), source };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(failed)?;
        let content = serde_json::to_vec_pretty(config).map_err(|error| failed(error.into()))?;
        let new = folder.join(format!(".config.json.{}", std::process::id()));
        let written = (|| {
            let _ = fs::remove_file(&new);
            let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&content)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)
        })();
        written.map_err(|error| {
            let _ = fs::remove_file(&new);
            failed(error)
        })
    }

    fn malformed(&self, problem: &str) -> CredentialError {
        CredentialError::Malformed { path: self.path.clone(), problem: problem.to_owned() }
    }
}

/// Under which key Docker keeps a registry.
fn key_of(domain: &str) -> &str {
    match domain {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => DOCKER_KEY,
        other => other,
    }
}

/// The host in a key, which may be a whole URL.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

fn helper_of(config: &Map<String, Value>, key: &str) -> Option<String> {
    let helpers = config.get("credHelpers").and_then(Value::as_object);
    let own = helpers.and_then(|helpers| helpers.get(host_of(key)).or_else(|| helpers.get(key)));
    let name = own.or_else(|| config.get("credsStore")).and_then(Value::as_str)?;
    (!name.is_empty()).then(|| format!("docker-credential-{name}"))
}

fn ask(helper: &str, key: &str) -> Result<Option<Credentials>, CredentialError> {
    let Some(answer) = run_helper(helper, "get", key)? else { return Ok(None) };
    let parsed = serde_json::from_str::<Value>(&answer).ok();
    let text = |name: &str| Some(parsed.as_ref()?.get(name)?.as_str()?.to_owned());
    match (text("Username"), text("Secret")) {
        (Some(user), Some(token)) if user == TOKEN_USER => Ok(Some(Credentials::IdentityToken(token))),
        (Some(user), Some(password)) => Ok(Some(Credentials::Password { user, password })),
        _ => Err(CredentialError::Helper {
            helper: helper.to_owned(),
            problem: "its answer has no Username and Secret".to_owned(),
        }),
    }
}

/// What a helper prints; `None` if it knows nothing of the registry.
fn run_helper(helper: &str, verb: &str, input: &str) -> Result<Option<String>, CredentialError> {
    let failed = |problem: String| CredentialError::Helper { helper: helper.to_owned(), problem };
    let spawned = Command::new(helper).arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| failed(format!("it cannot be run: {error}")))?;
    // One that does not read what it is asked fails by itself.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.success() {
        true => Ok(Some(printed)),
        // The words of docker-credential-helpers, which all helpers use.
        false if printed.contains("credentials not found") => Ok(None),
        false if printed.is_empty() => Err(failed(output.status.to_string())),
        false => Err(failed(printed)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn password(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn login_is_written_as_docker_does_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker/config.json");
        let store = CredentialStore::at(&path);
        assert_eq!(store.get("docker.io").unwrap(), None);
        assert!(!store.remove("docker.io").unwrap());
        assert!(store.put("docker.io", "me", "a:b").unwrap());
        assert!(store.put("localhost:5000", "you", "c").unwrap());
        let written: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(written["auths"]["https://index.docker.io/v1/"]["auth"], "bWU6YTpi");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(store.get("docker.io").unwrap(), password("me", "a:b"));
        assert_eq!(store.get("localhost:5000").unwrap(), password("you", "c"));
        assert!(store.remove("docker.io").unwrap());
        assert_eq!(store.get("docker.io").unwrap(), None);
        assert_eq!(store.get("localhost:5000").unwrap(), password("you", "c"));
    }

    #[test]
    fn old_keys_tokens_and_foreign_fields_are_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let content = r#"{"HttpHeaders":{"a":"b"},"auths":{"https://quay.io/v2/":{"auth":"eDp5"},
            "token.io":{"auth":"AA==","identitytoken":"t"},"bad.io":{"auth":"eA=="},"none.io":{}}}"#;
        fs::write(&path, content).unwrap();
        let store = CredentialStore::at(&path);
        assert_eq!(store.get("quay.io").unwrap(), password("x", "y"));
        assert_eq!(store.get("token.io").unwrap(), Some(Credentials::IdentityToken("t".to_owned())));
        assert!(store.get("bad.io").is_err());
        assert_eq!(store.get("none.io").unwrap(), None);
        store.put("new.io", "u", "p").unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("HttpHeaders"), "what is not ours stays");
        fs::write(&path, "[]").unwrap();
        assert!(store.get("quay.io").is_err());
    }

    #[test]
    fn login_takes_the_place_of_keys_of_older_forms() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let content = r#"{"auths":{"https://quay.io/v1/":{"auth":"eDp5"},"quay.io":{"auth":"YTpi"}}}"#;
        fs::write(&path, content).unwrap();
        let store = CredentialStore::at(&path);
        assert_eq!(store.get("quay.io").unwrap(), password("a", "b"), "what is written now is the latest");
        store.put("quay.io", "new", "p").unwrap();
        assert_eq!(store.get("quay.io").unwrap(), password("new", "p"));
        let written: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(written["auths"].as_object().unwrap().len(), 1);
    }

    #[test]
    fn helper_of_the_host_goes_before_the_general_one() {
        let config = json!({"credsStore": "all", "credHelpers": {"quay.io": "one"}});
        let Value::Object(config) = config else { unreachable!() };
        assert_eq!(helper_of(&config, "quay.io").as_deref(), Some("docker-credential-one"));
        assert_eq!(helper_of(&config, DOCKER_KEY).as_deref(), Some("docker-credential-all"));
        assert!(run_helper("docker-credential-that-is-not-there", "get", "x").is_err());
    }
}
