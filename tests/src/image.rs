//! Images made on the spot, as a docker-archive or an OCI image layout, with every digest right — or wrong on
//! purpose, since the parts are plain bytes.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::tar::Archive;

/// Lower-case hexadecimal SHA-256.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How an OCI layout holds its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layering {
    /// As tar.
    Plain,
    /// As gzipped tar.
    Gzip,
    /// As tar compressed by zstd.
    Zstd,
}

impl Layering {
    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    fn pack(self, layer: &[u8]) -> Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(layer.to_vec()),
            Self::Gzip => gzip(layer),
            Self::Zstd => zstd::encode_all(layer, 1).context("compress"),
        }
    }
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    encoder.finish().context("compress")
}

/// An image under construction.
#[derive(Debug, Clone)]
pub struct Image {
    /// Uncompressed layers, bottom first.
    pub layers: Vec<Vec<u8>>,
    /// The `config` object of the image configuration (OCI image-spec: config.md#properties).
    pub config: Value,
    /// The processor it is for, by Go's name.
    pub architecture: &'static str,
}

impl Image {
    /// An image of these layers with an ordinary `PATH` and nothing else set.
    pub fn new(layers: Vec<Vec<u8>>) -> Self {
        let config = json!({ "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"] });
        Self { layers, config, architecture: "amd64" }
    }

    fn configuration(&self) -> Vec<u8> {
        let diff_ids: Vec<String> =
            self.layers.iter().map(|layer| format!("sha256:{}", sha256_hex(layer))).collect();
        let document = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        document.to_string().into_bytes()
    }

    /// The image as `docker save` writes it, named `name` in its manifest.
    pub fn to_docker_archive(&self, name: &str) -> Vec<u8> {
        let configuration = self.configuration();
        let configuration_path = format!("{}.json", sha256_hex(&configuration));
        let layer_paths: Vec<String> =
            self.layers.iter().map(|layer| format!("{}/layer.tar", sha256_hex(layer))).collect();
        let manifest = json!([{
            "Config": configuration_path,
            "RepoTags": [format!("docker.io/library/{name}:latest")],
            "Layers": layer_paths,
        }]);
        let mut archive = Archive::default();
        archive.file(&configuration_path, &configuration);
        for (path, layer) in layer_paths.iter().zip(&self.layers) {
            archive.file(path, layer);
        }
        archive.file("manifest.json", manifest.to_string().as_bytes());
        archive.finish()
    }

    /// The image as an OCI image layout, named `name` in its index.
    pub fn to_oci_layout(&self, name: &str, layering: Layering) -> Result<Layout> {
        let packed = self.layers.iter().map(|layer| layering.pack(layer)).collect::<Result<Vec<_>>>()?;
        Ok(self.to_oci_layout_of(name, layering, packed))
    }

    /// The image as an OCI image layout with these bytes for its layers.
    pub fn to_oci_layout_of(&self, name: &str, layering: Layering, packed: Vec<Vec<u8>>) -> Layout {
        let mut layout = Layout::default();
        let configuration = layout.blob(self.configuration());
        let layers: Vec<Value> = packed
            .into_iter()
            .map(|layer| {
                let size = layer.len();
                descriptor(layering.media_type(), &layout.blob(layer), size)
            })
            .collect();
        let configuration_size = layout.size_of(&configuration);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &configuration, configuration_size),
            "layers": layers,
        });
        let manifest = layout.blob(manifest.to_string().into_bytes());
        let mut entry =
            descriptor("application/vnd.oci.image.manifest.v1+json", &manifest, layout.size_of(&manifest));
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        layout.files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        layout.files.push(("index.json".to_owned(), index.to_string().into_bytes()));
        layout
    }
}

fn descriptor(media_type: &str, digest: &str, size: usize) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

/// The files of an OCI image layout (OCI image-spec: image-layout.md).
#[derive(Debug, Default)]
pub struct Layout {
    /// Relative path and content, in the order they were made.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Layout {
    fn blob(&mut self, bytes: Vec<u8>) -> String {
        let digest = sha256_hex(&bytes);
        let path = blob_path(&digest);
        if !self.files.iter().any(|(known, _)| *known == path) {
            self.files.push((path, bytes));
        }
        digest
    }

    fn size_of(&self, digest: &str) -> usize {
        let path = blob_path(digest);
        self.files.iter().find(|(known, _)| *known == path).map_or(0, |(_, bytes)| bytes.len())
    }

    /// The content of the largest blob, to be damaged.
    pub fn largest_blob(&mut self) -> &mut Vec<u8> {
        let largest = self.files.iter_mut().max_by_key(|(_, bytes)| bytes.len());
        &mut largest.expect("a layout has files").1
    }

    /// The layout as one tar archive.
    pub fn to_tar(&self) -> Vec<u8> {
        let mut archive = Archive::default();
        for (path, bytes) in &self.files {
            archive.file(path, bytes);
        }
        archive.finish()
    }

    /// Writes the layout into an existing directory.
    pub fn write_to(&self, directory: &Path) -> Result<()> {
        for (path, bytes) in &self.files {
            let path = directory.join(path);
            let parent = path.parent().context("a layout's file has a parent")?;
            fs::create_dir_all(parent)?;
            fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}
