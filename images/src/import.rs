//! Importing: a file system in a tar archive becomes an image of one layer, with a configuration from nothing but the
//! changes that are asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::layer::{self, ExpectedLayer, LayerError};
use crate::load::{LoadError, unpack_file};
use crate::reference::Reference;
use crate::store::{BlobRecord, ImageRecord, LayerRecord, Store, StoreError};

/// A change to an image's configuration, written as an instruction of a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// `CMD`
    Command(Vec<String>),
    /// `ENTRYPOINT`
    Entrypoint(Vec<String>),
    /// `ENV NAME=VALUE…`
    Env(Vec<(String, String)>),
    /// `LABEL NAME=VALUE…`
    Label(Vec<(String, String)>),
    /// `EXPOSE PORT[/PROTOCOL]…`
    Expose(Vec<String>),
    /// `VOLUME PATH…`
    Volume(Vec<String>),
    /// `USER`
    User(String),
    /// `WORKDIR`
    WorkingDir(String),
    /// `STOPSIGNAL`
    StopSignal(String),
}

/// Why a text is no change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no change: {problem}")]
pub struct ParseChangeError {
    text: String,
    problem: &'static str,
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The archive cannot be read.
    #[error(transparent)]
    Source(#[from] LoadError),
    /// It is no file system.
    #[error("cannot import it as a layer")]
    Layer(#[from] LayerError),
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The scratch file cannot be read.
    #[error("cannot read the archive again")]
    Read(#[source] io::Error),
}

/// The `config` object (OCI image-spec: config.md#properties).
#[derive(Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    #[serde(skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    exposed_ports: BTreeMap<String, Value>,
    env: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    entrypoint: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cmd: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    volumes: BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "String::is_empty")]
    working_dir: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    stop_signal: String,
}

impl Store {
    /// Makes an image of the file system in a tar archive (plain, gzip or zstd; a pipe too).
    pub fn import(
        &self,
        archive: &Path,
        name: Option<&Reference>,
        changes: &[Change],
        message: &str,
    ) -> Result<Digest, ImportError> {
        let result = self.import_held(archive, name, changes, message);
        let swept = self.sweep();
        let id = result?;
        swept?;
        Ok(id)
    }

    fn import_held(
        &self,
        archive: &Path,
        name: Option<&Reference>,
        changes: &[Change],
        message: &str,
    ) -> Result<Digest, ImportError> {
        let _hold = self.hold()?;
        // Its digest must be known before it is converted, so it is read twice.
        let read = |source| LoadError::Read { path: archive.to_owned(), source };
        let file = File::open(archive).map_err(read)?;
        let kind = file.metadata().map_err(read)?.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            return Err(read(io::Error::other("it is a device, which has no end")).into());
        }
        let file = unpack_file(archive, file, self)?;
        let again = || {
            let mut file = file.try_clone()?;
            io::Seek::rewind(&mut file).map(|()| file)
        };
        let digests = layer::measure(again().map_err(ImportError::Read)?)?;
        let diff_id = digests.diff_id;
        let blob = BlobRecord { digest: digests.blob, bytes: digests.blob_bytes };
        let known = self.whole_layer(diff_id).filter(|_| self.has_archive(diff_id, &blob));
        let erofs_bytes = match known {
            Some(bytes) => bytes,
            None => {
                let new = self.new_layer()?;
                let expected = ExpectedLayer { blob: None, diff_id };
                let file = again().map_err(ImportError::Read)?;
                let (bytes, _) = layer::convert(file, &expected, new.blob(), new.recipe(), |_| {})?;
                new.publish(diff_id, true)?;
                bytes
            }
        };
        let config = config(changes, diff_id, message).to_string();
        let id = self.put_blob(config.as_bytes())?;
        let names = name.iter().map(ToString::to_string).collect();
        let layers = vec![LayerRecord { diff_id, erofs_bytes, blob: Some(blob) }];
        self.commit(vec![ImageRecord { id, manifest: None, digests: Vec::new(), names, layers }])?;
        Ok(id)
    }
}

fn config(changes: &[Change], diff_id: Digest, message: &str) -> Value {
    let mut config = Config::default();
    for change in changes {
        match change.clone() {
            Change::Command(words) => config.cmd = words,
            Change::Entrypoint(words) => config.entrypoint = words,
            Change::Env(pairs) => {
                for (name, value) in pairs {
                    config.env.retain(|known| known.split('=').next() != Some(&name));
                    config.env.push(format!("{name}={value}"));
                }
            }
            Change::Label(pairs) => config.labels.extend(pairs),
            Change::Expose(ports) => config.exposed_ports.extend(ports.into_iter().map(|port| {
                let port = if port.contains('/') { port } else { format!("{port}/tcp") };
                (port, json!({}))
            })),
            Change::Volume(paths) => config.volumes.extend(paths.into_iter().map(|path| (path, json!({})))),
            Change::User(user) => config.user = user,
            Change::WorkingDir(directory) => config.working_dir = directory,
            Change::StopSignal(signal) => config.stop_signal = signal,
        }
    }
    let created = timestamp(build_time());
    json!({
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": "cloche import", "comment": message}],
    })
}

/// Now, in seconds since 1970, or what SOURCE_DATE_EPOCH says
/// (<https://reproducible-builds.org/specs/source-date-epoch/>).
fn build_time() -> u64 {
    let told = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    told.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// RFC 3339, in UTC. The calendar's rule of 400 years is counted from 1 March of year 0, where leap days come last.
fn timestamp(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

impl FromStr for Change {
    type Err = ParseChangeError;

    fn from_str(text: &str) -> Result<Change, ParseChangeError> {
        let bad = |problem| ParseChangeError { text: text.chars().take(200).collect(), problem };
        let (instruction, rest) = text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
        let rest = rest.trim();
        if rest.is_empty() {
            return Err(bad("nothing follows the instruction"));
        }
        let one = || match words(rest).as_deref() {
            Some([word]) => Ok(word.clone()),
            _ => Err(bad("one word must follow")),
        };
        let list = || {
            let array = rest.starts_with('[').then(|| serde_json::from_str(rest).ok());
            array.unwrap_or_else(|| words(rest)).ok_or_else(|| bad("the words that follow are malformed"))
        };
        // As in a Dockerfile: a JSON array is a command line, and anything else a shell's.
        let command = || match rest.starts_with('[') {
            true => serde_json::from_str(rest).map_err(|_| bad("this is no JSON array of strings")),
            false => Ok(vec!["/bin/sh".to_owned(), "-c".to_owned(), rest.to_owned()]),
        };
        Ok(match instruction.to_ascii_uppercase().as_str() {
            "CMD" => Change::Command(command()?),
            "ENTRYPOINT" => Change::Entrypoint(command()?),
            "ENV" => Change::Env(pairs(rest).ok_or_else(|| bad("write NAME=VALUE"))?),
            "LABEL" => Change::Label(pairs(rest).ok_or_else(|| bad("write NAME=VALUE"))?),
            "EXPOSE" => Change::Expose(list()?),
            "VOLUME" => Change::Volume(list()?),
            "USER" => Change::User(one()?),
            "WORKDIR" => Change::WorkingDir(one()?),
            "STOPSIGNAL" => Change::StopSignal(one()?),
            _ => {
                let known =
                    "known are CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR";
                return Err(bad(known));
            }
        })
    }
}

/// `NAME=VALUE…`, or the older `NAME VALUE` in which the rest of the line is the value.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let words = words(text)?;
    if !words.first()?.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace)?;
        return Some(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let pair = |word: &String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    words
        .iter()
        .map(pair)
        .collect::<Option<Vec<_>>>()
        .filter(|pairs| pairs.iter().all(|(name, _)| !name.is_empty()))
}

/// Words as a shell would split them: quotes keep together, a backslash takes what follows as it is.
fn words(text: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), letter) if letter == open => quote = None,
            (None, '"' | '\'') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().push(letters.next()?),
            (None, letter) if letter.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_as_the_calendar_has_it() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }

    #[test]
    fn change_is_read_as_in_a_dockerfile() {
        let change = |text: &str| text.parse::<Change>();
        let strings = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(change(r#"CMD ["a", "b c"]"#), Ok(Change::Command(strings(&["a", "b c"]))));
        assert_eq!(
            change("entrypoint run it"),
            Ok(Change::Entrypoint(strings(&["/bin/sh", "-c", "run it"])))
        );
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            change(r#"ENV A=1 B="two words" C=\ x"#),
            Ok(Change::Env(vec![pair("A", "1"), pair("B", "two words"), pair("C", " x")]))
        );
        assert_eq!(change("ENV A two words"), Ok(Change::Env(vec![pair("A", "two words")])));
        assert_eq!(change("EXPOSE 80 53/udp"), Ok(Change::Expose(strings(&["80", "53/udp"]))));
        assert_eq!(change(r#"VOLUME ["/a"]"#), Ok(Change::Volume(strings(&["/a"]))));
        assert_eq!(change("USER 1:2"), Ok(Change::User("1:2".to_owned())));
        for bad in ["", "CMD", "RUN x", "CMD [1]", "USER a b", "ENV A", "ENV =b", "LABEL a='b"] {
            assert!(change(bad).is_err(), "{bad}");
        }
    }
}
