//! The OCI image layout (OCI image-spec: image-layout.md): `oci-layout`, `index.json`, and blobs by digest. Each blob
//! is checked against the size and digest of the descriptor that names it.

use std::collections::HashSet;

use oci_spec::image::{Descriptor, ImageIndex};
use serde::Deserialize;

use super::manifest::{Blobs, Form, annotation, blob_member, digest_of, is_image, plan_image, select};
use super::source::Source;
use super::{LoadError, Metadata, PlannedImage, parse_json};
use crate::digest::Digest;
use crate::limits::{MAX_MANIFEST_BYTES, MAX_MANIFESTS};
use crate::reference::Reference;

pub(super) const MARKER: &str = "oci-layout";
pub(super) const INDEX: &str = "index.json";

/// A tag or a whole name (image-layout.md#indexjson-file).
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The whole name, as containerd and newer Dockers write it.
const IMAGE_NAME: &str = "io.containerd.image.name";

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
            images.push(metadata.count(INDEX, plan_image(source, INDEX, &manifest, names)?)?);
        } else if let Some(image) = images.iter_mut().find(|image| image.is_manifest(digest)) {
            // One image under several names has a descriptor for each.
            image.names.extend(names);
        }
    }
    Ok(images)
}

impl Blobs for Source {
    type Error = LoadError;

    fn fetch(
        &self,
        named_by: &str,
        _form: Form,
        digest: Digest,
        _bytes: u64,
        limit: u64,
    ) -> Result<(String, Vec<u8>), LoadError> {
        let member = blob_member(digest);
        let content = self.read(&member, named_by, limit)?;
        Ok((member, content))
    }
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

/// The image's name, if the annotations hold a whole one. A tag alone names no image.
fn name_of(descriptor: &Descriptor) -> Result<Option<Reference>, LoadError> {
    if let Some(name) = annotation(descriptor, IMAGE_NAME) {
        return name.parse().map(Some).map_err(|error| invalid(INDEX, format!("{error}")));
    }
    let name = annotation(descriptor, REF_NAME).filter(|name| name.contains(['/', ':', '@']));
    // The specification allows names of other forms; they name no image for us.
    Ok(name.and_then(|name| name.parse().ok()))
}

fn invalid(member: &str, problem: String) -> LoadError {
    LoadError::Invalid { member: member.to_owned(), problem }
}
