//! Entry points for fuzzing what a registry answers; see `crate::fuzzing`.

use super::auth::{self, Challenge};
use super::url::Url;
use super::{client, download, http};
use crate::digest::Digest;
use crate::load::LoadError;
use crate::load::manifest::{self, Blobs, Form, Kind};

/// Files by their digests.
struct Shelf<'a>(&'a [Vec<u8>]);

impl Blobs for Shelf<'_> {
    type Error = LoadError;

    fn fetch(
        &self,
        named_by: &str,
        _form: Form,
        digest: Digest,
        _bytes: u64,
        _limit: u64,
    ) -> Result<(String, Vec<u8>), LoadError> {
        let found = self.0.iter().find(|file| Digest::of(file) == digest);
        let missing = || LoadError::Missing {
            path: named_by.into(),
            member: digest.to_string(),
            named_by: named_by.to_owned(),
        };
        Ok((digest.to_string(), found.ok_or_else(missing)?.clone()))
    }
}

/// Reads the first of several files as what a tag stands for, and the others as what it leads to. Returns how many
/// layers the image has.
pub(crate) fn manifests(files: &[Vec<u8>]) -> Option<usize> {
    let (first, others) = files.split_first()?;
    let shelf = Shelf(others);
    let manifest = match manifest::kind_of("tag", first, None).ok()? {
        Kind::Manifest => first.clone(),
        Kind::Index => {
            let chosen = manifest::select_in(&shelf, "tag", first).ok()?;
            manifest::read(&shelf, "tag", &chosen).ok()?
        }
    };
    Some(manifest::plan_manifest(&shelf, "tag", manifest, Vec::new()).ok()?.layers.len())
}

/// Reads bytes as the head of an answer, and all that is made of its fields; the rest as a token and as an error.
pub(crate) fn answer(bytes: &[u8]) {
    let base =
        Url { secure: true, host: "host".to_owned(), port: 443, target: "/v2/app/blobs/x?y".to_owned() };
    http::fuzz_head(bytes, |name, value| match name {
        "www-authenticate" => drop(Challenge::choose([value].into_iter())),
        "location" => {
            let Some(url) = base.join(value) else { return };
            let again = Url::parse(&format!("{}{}", url.origin(), url.target));
            assert!(again == Some(url), "what a URL is printed as is another one");
        }
        "content-range" => drop(download::starts_at(Some(value), 7)),
        _ => {}
    });
    let body = bytes.windows(4).position(|end| end == b"\r\n\r\n").and_then(|at| bytes.get(at + 4..));
    let body = body.unwrap_or(bytes);
    let said = client::message_in(body);
    assert!(!said.chars().any(char::is_control) && said.chars().count() < 310, "{said:?}");
    if let Ok(token) = auth::token_in("url", body) {
        assert!(!token.contains(['\r', '\n']), "{token:?}");
    }
}
