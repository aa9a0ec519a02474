//! Manifests and indexes, wherever they come from (OCI image-spec: manifest.md, image-index.md): which image of
//! several is for this machine, and what it is made of. Each file is checked against the size and digest of the
//! descriptor that names it.

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{LoadError, PlannedImage, PlannedLayer, parse_config, parse_json};
use crate::digest::Digest;
use crate::layer::ExpectedLayer;
use crate::limits::{MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, MAX_LAYERS, MAX_MANIFEST_BYTES, MAX_MANIFESTS};
use crate::reference::Reference;

/// On what build tools add beside images and is none.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Where manifests and configurations are read from.
pub(crate) trait Blobs {
    /// Why one cannot be read.
    type Error: From<LoadError>;

    /// What `descriptor`, in `named_by`, stands for, in at most `limit` bytes; and its name for messages. What comes
    /// need not be checked yet.
    fn fetch(
        &self,
        named_by: &str,
        form: Form,
        digest: Digest,
        bytes: u64,
        limit: u64,
    ) -> Result<(String, Vec<u8>), Self::Error>;
}

/// What is read: registries have manifests and blobs under different addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A manifest or an index.
    Manifest,
    Blob,
}

/// What a document that has been found under a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Manifest,
    Index,
}

/// Tells manifests from indexes. What it is sent as and what it says of itself must agree, and one that can be read
/// as both is refused: two programs could see two images in it (GHSA-mc8v-mgrf-8f4m).
pub(crate) fn kind_of(member: &str, content: &[u8], sent_as: Option<&str>) -> Result<Kind, LoadError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outline {
        #[serde(default)]
        media_type: Option<String>,
        #[serde(default)]
        schema_version: Option<u32>,
        #[serde(default)]
        manifests: Option<IgnoredAny>,
        #[serde(default)]
        layers: Option<IgnoredAny>,
        #[serde(default)]
        config: Option<IgnoredAny>,
    }
    let outline: Outline = parse_json(member, content)?;
    if outline.schema_version == Some(1) {
        let problem =
            "a manifest of schema 1, which Docker has given up; push the image again with a newer tool";
        return Err(invalid(member, problem.to_owned()));
    }
    let by_type = |name: &str| match name.split(';').next().unwrap_or_default().trim() {
        DOCKER_MANIFEST => Some(Kind::Manifest),
        DOCKER_INDEX => Some(Kind::Index),
        name if *name == *MediaType::ImageManifest.as_ref() => Some(Kind::Manifest),
        name if *name == *MediaType::ImageIndex.as_ref() => Some(Kind::Index),
        _ => None,
    };
    let by_form = match (outline.manifests.is_some(), outline.layers.is_some() || outline.config.is_some()) {
        (true, false) => Kind::Index,
        (false, true) => Kind::Manifest,
        _ => return Err(invalid(member, "neither clearly a manifest nor clearly an index".to_owned())),
    };
    let said = [sent_as.and_then(by_type), outline.media_type.as_deref().and_then(by_type)];
    if said.into_iter().flatten().any(|kind| kind != by_form) {
        return Err(invalid(member, "its media type is not what it is".to_owned()));
    }
    Ok(by_form)
}

/// Reads an index; there must be something in it for this platform.
pub(crate) fn select_in<B: Blobs>(blobs: &B, member: &str, index: &[u8]) -> Result<Descriptor, B::Error> {
    let index: ImageIndex = parse_json(member, index)?;
    select(blobs, member, index.manifests(), 0)
}

/// Whether a descriptor may lead to an image. Attestations and signatures do not.
pub(super) fn is_image(descriptor: &Descriptor) -> bool {
    let of_kind = is_index(descriptor) || is_manifest(descriptor);
    of_kind && annotation(descriptor, REFERENCE_TYPE).is_none()
}

pub(super) fn annotation(descriptor: &Descriptor, key: &str) -> Option<String> {
    descriptor.annotations().as_ref()?.get(key).cloned()
}

fn is_index(descriptor: &Descriptor) -> bool {
    let media_type = descriptor.media_type();
    *media_type == MediaType::ImageIndex || media_type.as_ref() == DOCKER_INDEX
}

fn is_manifest(descriptor: &Descriptor) -> bool {
    let media_type = descriptor.media_type();
    *media_type == MediaType::ImageManifest || media_type.as_ref() == DOCKER_MANIFEST
}

/// The manifest for this platform among `descriptors`, through nested indexes if need be. A descriptor without a
/// platform is taken if there is no better one; the configuration will tell.
pub(super) fn select<B: Blobs>(
    blobs: &B,
    member: &str,
    descriptors: &[Descriptor],
    depth: usize,
) -> Result<Descriptor, B::Error> {
    if descriptors.len() > MAX_MANIFESTS {
        let problem = format!("{} manifests, where at most {MAX_MANIFESTS} are accepted", descriptors.len());
        return Err(invalid(member, problem).into());
    }
    let best = descriptors.iter().filter(|d| is_image(d)).min_by_key(|descriptor| fit(descriptor));
    let chosen = best.filter(|descriptor| fit(descriptor) < Fit::Other);
    let Some(chosen) = chosen else {
        let available = descriptors.iter().filter(|d| is_image(d)).filter_map(platform_name).collect();
        return Err(LoadError::Platform { member: member.to_owned(), available }.into());
    };
    if !is_index(chosen) {
        return Ok(chosen.clone());
    }
    if depth == MAX_INDEX_DEPTH {
        let problem = format!("more than {MAX_INDEX_DEPTH} indexes within each other");
        return Err(invalid(member, problem).into());
    }
    let (member, content) = read_blob(blobs, member, Form::Manifest, chosen, MAX_MANIFEST_BYTES)?;
    let index: ImageIndex = parse_json(&member, &content)?;
    select(blobs, &member, index.manifests(), depth + 1)
}

/// How well a descriptor's platform suits; the first is the best.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Exact,
    /// Made for newer processors than every amd64 is.
    Variant,
    Unknown,
    Other,
}

fn fit(descriptor: &Descriptor) -> Fit {
    match descriptor.platform() {
        None => Fit::Unknown,
        Some(platform) if (platform.os(), platform.architecture()) != (&Os::Linux, &Arch::Amd64) => {
            Fit::Other
        }
        Some(platform) => match platform.variant().as_deref() {
            None | Some("" | "v1") => Fit::Exact,
            Some(_) => Fit::Variant,
        },
    }
}

fn platform_name(descriptor: &Descriptor) -> Option<String> {
    let platform = descriptor.platform().as_ref()?;
    let variant = platform.variant().as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
    Some(quoted(&format!("{}/{}{variant}", platform.os(), platform.architecture())))
}

/// A stranger's word as a message may show it: of bounded length, and nothing that ends a line or steers a terminal.
pub(super) fn quoted(word: &str) -> String {
    const MOST: usize = 100;
    let rest = if word.chars().nth(MOST).is_some() { "…" } else { "" };
    word.chars().take(MOST).flat_map(char::escape_debug).chain(rest.chars()).collect()
}

/// The manifest that a descriptor in `named_by` stands for.
pub(crate) fn read<B: Blobs>(
    blobs: &B,
    named_by: &str,
    descriptor: &Descriptor,
) -> Result<Vec<u8>, B::Error> {
    Ok(read_blob(blobs, named_by, Form::Manifest, descriptor, MAX_MANIFEST_BYTES)?.1)
}

/// What the manifest that `descriptor` stands for is made of.
pub(super) fn plan_image<B: Blobs>(
    blobs: &B,
    named_by: &str,
    descriptor: &Descriptor,
    names: Vec<Reference>,
) -> Result<PlannedImage, B::Error> {
    let (member, manifest) = read_blob(blobs, named_by, Form::Manifest, descriptor, MAX_MANIFEST_BYTES)?;
    plan_manifest(blobs, &member, manifest, names)
}

/// What a manifest is made of, which is checked by itself already.
pub(crate) fn plan_manifest<B: Blobs>(
    blobs: &B,
    member: &str,
    manifest: Vec<u8>,
    names: Vec<Reference>,
) -> Result<PlannedImage, B::Error> {
    let parsed: ImageManifest = parse_json(member, &manifest)?;
    let config = parsed.config();
    if *config.media_type() != MediaType::ImageConfig && config.media_type().as_ref() != DOCKER_CONFIG {
        let media_type = quoted(config.media_type().as_ref());
        let problem = format!("its configuration is of type {media_type}, so this is not an image");
        return Err(invalid(member, problem).into());
    }
    if parsed.layers().len() > MAX_LAYERS {
        return Err(invalid(member, format!("more than {MAX_LAYERS} layers")).into());
    }
    let (config_member, config) = read_blob(blobs, member, Form::Blob, config, MAX_CONFIG_BYTES)?;
    let diff_ids = parse_config(&config_member, &config)?;
    if parsed.layers().len() != diff_ids.len() {
        let (there, named) = (parsed.layers().len(), diff_ids.len());
        let problem = format!("{there} layers, while {config_member} names {named}");
        return Err(invalid(member, problem).into());
    }
    let layers = parsed.layers().iter().zip(diff_ids).map(|(layer, diff_id)| {
        if layer.media_type().as_ref().ends_with("+encrypted") {
            return Err(invalid(member, "encrypted layers are not supported".to_owned()));
        }
        let digest = digest_of(member, layer)?;
        let expected = ExpectedLayer { blob: Some((digest, layer.size())), diff_id };
        Ok(PlannedLayer { member: blob_member(digest), expected })
    });
    let layers = layers.collect::<Result<_, _>>()?;
    Ok(PlannedImage { names, layers, config, manifest: Some(manifest) })
}

/// Reads and verifies what a descriptor in `named_by` stands for.
fn read_blob<B: Blobs>(
    blobs: &B,
    named_by: &str,
    form: Form,
    descriptor: &Descriptor,
    limit: u64,
) -> Result<(String, Vec<u8>), B::Error> {
    let expected = digest_of(named_by, descriptor)?;
    let (member, content) = blobs.fetch(named_by, form, expected, descriptor.size(), limit)?;
    if content.len() as u64 != descriptor.size() {
        let (expected, actual) = (descriptor.size(), content.len() as u64);
        return Err(LoadError::Size { member, expected, actual }.into());
    }
    let actual = Digest::of(&content);
    if actual != expected {
        return Err(LoadError::Digest { member, expected, actual }.into());
    }
    Ok((member, content))
}

pub(super) fn blob_member(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

pub(super) fn digest_of(member: &str, descriptor: &Descriptor) -> Result<Digest, LoadError> {
    descriptor.digest().as_ref().parse::<Digest>().map_err(|error| invalid(member, error.to_string()))
}

fn invalid(member: &str, problem: String) -> LoadError {
    LoadError::Invalid { member: member.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_are_short_and_do_nothing() {
        assert_eq!(quoted("plan9/é"), "plan9/é");
        assert_eq!(quoted("a\u{1b}[2J\u{9b}\n"), r"a\u{1b}[2J\u{9b}\n");
        let cut = quoted(&"x".repeat(1 << 20));
        assert!(cut.len() < 110 && cut.ends_with('…'), "{cut}");
    }

    #[test]
    fn type_of_a_configuration_is_quoted() {
        struct Nothing;
        impl Blobs for Nothing {
            type Error = LoadError;
            fn fetch(
                &self,
                _: &str,
                _: Form,
                _: Digest,
                _: u64,
                _: u64,
            ) -> Result<(String, Vec<u8>), LoadError> {
                panic!("there is nothing to fetch")
            }
        }
        let digest = Digest::of(b"");
        let manifest = format!(
            r#"{{"schemaVersion":2,"layers":[],"config":{{"mediaType":"x/\u001b]0;{}","digest":"{digest}","size":2}}}}"#,
            "y".repeat(10_000)
        );
        let plan = plan_manifest(&Nothing, "m", manifest.into_bytes(), Vec::new());
        let error = plan.err().unwrap().to_string();
        assert!(error.contains(r"x/\u{1b}]0;yyy") && error.len() < 300, "{error}");
    }

    #[test]
    fn manifest_and_index_are_told_apart_and_what_is_both_is_refused() {
        let kind = |content: &str, sent_as| kind_of("m", content.as_bytes(), sent_as);
        let manifest = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        assert_eq!(kind(manifest, None).unwrap(), Kind::Manifest);
        assert_eq!(kind(manifest, Some(DOCKER_MANIFEST)).unwrap(), Kind::Manifest);
        assert_eq!(kind(manifest, Some("application/json; charset=utf-8")).unwrap(), Kind::Manifest);
        assert_eq!(kind(index, Some(DOCKER_INDEX)).unwrap(), Kind::Index);
        assert!(kind(index, Some(DOCKER_MANIFEST)).is_err());
        let said = format!(r#"{{"mediaType":"{DOCKER_INDEX}","layers":[]}}"#);
        for bad in [
            said.as_str(),
            "{}",
            r#"{"layers":[],"manifests":[]}"#,
            r#"{"schemaVersion":1,"fsLayers":[]}"#,
            "[",
        ] {
            assert!(kind(bad, None).is_err(), "{bad}");
        }
    }
}
