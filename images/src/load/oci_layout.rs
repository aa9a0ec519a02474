//! The OCI image layout (OCI image-spec: image-layout.md): `oci-layout`, `index.json`, and blobs by digest. Each blob
//! is checked against the size and digest of the descriptor that names it.

use std::collections::HashSet;

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;

use super::source::Source;
use super::{LoadError, Metadata, PlannedImage, PlannedLayer, parse_config, parse_json};
use crate::digest::Digest;
use crate::layer::ExpectedLayer;
use crate::limits::{MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, MAX_LAYERS, MAX_MANIFEST_BYTES, MAX_MANIFESTS};
use crate::reference::Reference;

pub(super) const MARKER: &str = "oci-layout";
pub(super) const INDEX: &str = "index.json";

/// A tag or a whole name (image-layout.md#indexjson-file).
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The whole name, as containerd and newer Dockers write it.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// On what build tools add beside images and is none.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

pub(super) fn plan(source: &Source) -> Result<Vec<PlannedImage>, LoadError> {
    let marker: Marker = parse_json(MARKER, &source.read(MARKER, "the OCI layout", MAX_MANIFEST_BYTES)?)?;
    if marker.image_layout_version != "1.0.0" {
        let problem = format!("layout version {:?}, where 1.0.0 is known", marker.image_layout_version);
        return Err(invalid(MARKER, problem));
    }
    let index = source.read(INDEX, "the OCI layout", MAX_MANIFEST_BYTES)?;
    let index: ImageIndex = parse_json(INDEX, &index)?;
    let groups = group_by_name(index.manifests())?;
    let mut images: Vec<PlannedImage> = Vec::new();
    let mut seen = HashSet::new();
    let mut metadata = Metadata::default();
    for Group { names, descriptors } in groups {
        let manifest = select(source, INDEX, &descriptors, 0)?;
        let digest = digest_of(INDEX, &manifest)?;
        if seen.insert(digest) {
            images.push(metadata.count(INDEX, plan_image(source, &manifest, names)?)?);
        } else if let Some(image) = images.iter_mut().find(|image| image.is_manifest(digest)) {
            // One image under several names has a descriptor for each.
            image.names.extend(names);
        }
    }
    Ok(images)
}

impl PlannedImage {
    fn is_manifest(&self, digest: Digest) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| Digest::of(manifest) == digest)
    }
}

/// Descriptors of the same name: one image, perhaps for several platforms.
struct Group {
    names: Vec<Reference>,
    descriptors: Vec<Descriptor>,
}

fn group_by_name(descriptors: &[Descriptor]) -> Result<Vec<Group>, LoadError> {
    if descriptors.len() > MAX_MANIFESTS {
        let problem = format!("{} manifests, where at most {MAX_MANIFESTS} are accepted", descriptors.len());
        return Err(invalid(INDEX, problem));
    }
    let mut groups: Vec<(Option<String>, Group)> = Vec::new();
    for descriptor in descriptors.iter().filter(|descriptor| is_image(descriptor)) {
        let key = annotation(descriptor, IMAGE_NAME).or_else(|| annotation(descriptor, REF_NAME));
        match groups.iter_mut().find(|(name, _)| *name == key) {
            Some((_, group)) => group.descriptors.push(descriptor.clone()),
            None => {
                let names = name_of(descriptor)?.into_iter().collect();
                groups.push((key, Group { names, descriptors: vec![descriptor.clone()] }));
            }
        }
    }
    Ok(groups.into_iter().map(|(_, group)| group).collect())
}

fn annotation(descriptor: &Descriptor, key: &str) -> Option<String> {
    descriptor.annotations().as_ref()?.get(key).cloned()
}

/// The image's name, if the annotations hold a whole one. A tag alone names no image.
fn name_of(descriptor: &Descriptor) -> Result<Option<Reference>, LoadError> {
    if let Some(name) = annotation(descriptor, IMAGE_NAME) {
        return name.parse().map(Some).map_err(|error| invalid(INDEX, format!("{error}")));
    }
    let name = annotation(descriptor, REF_NAME).filter(|name| name.contains(['/', ':', '@']));
    // The specification allows names of other forms; they name no image for us.
    Ok(name.and_then(|name| name.parse().ok()))
}

/// Whether a descriptor may lead to an image. Attestations and signatures do not.
fn is_image(descriptor: &Descriptor) -> bool {
    let of_kind = is_index(descriptor) || is_manifest(descriptor);
    of_kind && annotation(descriptor, REFERENCE_TYPE).is_none()
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
fn select(
    source: &Source,
    member: &str,
    descriptors: &[Descriptor],
    depth: usize,
) -> Result<Descriptor, LoadError> {
    let best = descriptors.iter().filter(|d| is_image(d)).min_by_key(|descriptor| fit(descriptor));
    let chosen = best.filter(|descriptor| fit(descriptor) < Fit::Other);
    let Some(chosen) = chosen else {
        let available = descriptors.iter().filter(|d| is_image(d)).filter_map(platform_name).collect();
        return Err(LoadError::Platform { member: member.to_owned(), available });
    };
    if !is_index(chosen) {
        return Ok(chosen.clone());
    }
    if depth == MAX_INDEX_DEPTH {
        return Err(invalid(member, format!("more than {MAX_INDEX_DEPTH} indexes within each other")));
    }
    let (member, content) = read_blob(source, member, chosen, MAX_MANIFEST_BYTES)?;
    let index: ImageIndex = parse_json(&member, &content)?;
    select(source, &member, index.manifests(), depth + 1)
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
    Some(format!("{}/{}{variant}", platform.os(), platform.architecture()))
}

fn plan_image(
    source: &Source,
    descriptor: &Descriptor,
    names: Vec<Reference>,
) -> Result<PlannedImage, LoadError> {
    let (member, manifest) = read_blob(source, INDEX, descriptor, MAX_MANIFEST_BYTES)?;
    let parsed: ImageManifest = parse_json(&member, &manifest)?;
    let config = parsed.config();
    if *config.media_type() != MediaType::ImageConfig && config.media_type().as_ref() != DOCKER_CONFIG {
        let problem =
            format!("its configuration is of type {}, so this is not an image", config.media_type());
        return Err(invalid(&member, problem));
    }
    if parsed.layers().len() > MAX_LAYERS {
        return Err(invalid(&member, format!("more than {MAX_LAYERS} layers")));
    }
    let (config_member, config) = read_blob(source, &member, config, MAX_CONFIG_BYTES)?;
    let diff_ids = parse_config(&config_member, &config)?;
    if parsed.layers().len() != diff_ids.len() {
        let (there, named) = (parsed.layers().len(), diff_ids.len());
        return Err(invalid(&member, format!("{there} layers, while {config_member} names {named}")));
    }
    let layers = parsed.layers().iter().zip(diff_ids).map(|(layer, diff_id)| {
        if layer.media_type().as_ref().ends_with("+encrypted") {
            return Err(invalid(&member, "encrypted layers are not supported".to_owned()));
        }
        let digest = digest_of(&member, layer)?;
        let expected = ExpectedLayer { blob: Some((digest, layer.size())), diff_id };
        Ok(PlannedLayer { member: blob_member(digest), expected })
    });
    Ok(PlannedImage { names, layers: layers.collect::<Result<_, _>>()?, config, manifest: Some(manifest) })
}

/// Reads and verifies what a descriptor in `named_by` stands for.
fn read_blob(
    source: &Source,
    named_by: &str,
    descriptor: &Descriptor,
    limit: u64,
) -> Result<(String, Vec<u8>), LoadError> {
    let expected = digest_of(named_by, descriptor)?;
    let member = blob_member(expected);
    let content = source.read(&member, named_by, limit)?;
    if content.len() as u64 != descriptor.size() {
        let (expected, actual) = (descriptor.size(), content.len() as u64);
        return Err(LoadError::Size { member, expected, actual });
    }
    let actual = Digest::of(&content);
    if actual != expected {
        return Err(LoadError::Digest { member, expected, actual });
    }
    Ok((member, content))
}

fn blob_member(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn digest_of(member: &str, descriptor: &Descriptor) -> Result<Digest, LoadError> {
    descriptor.digest().as_ref().parse::<Digest>().map_err(|error| invalid(member, error.to_string()))
}

fn invalid(member: &str, problem: String) -> LoadError {
    LoadError::Invalid { member: member.to_owned(), problem }
}
