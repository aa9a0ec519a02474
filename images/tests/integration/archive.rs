//! Image archives around layers: OCI layouts and docker-archives, with every digest right, unless a test changes it.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::bed::{Failure, sha256};
use crate::tarball::{Item, Tarball};

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    fn suffix(self) -> &'static str {
        match self {
            Packing::Plain => "",
            Packing::Gzip => "+gzip",
            Packing::Zstd => "+zstd",
        }
    }

    pub fn pack(self, bytes: &[u8]) -> Result<Vec<u8>, Failure> {
        match self {
            Packing::Plain => Ok(bytes.to_vec()),
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes)?;
                Ok(encoder.finish()?)
            }
            Packing::Zstd => Ok(zstd::stream::encode_all(bytes, 1)?),
        }
    }
}

/// An image to be packed.
#[derive(Clone)]
pub struct TestImage {
    pub layers: Vec<Vec<u8>>,
    pub packing: Packing,
    pub name: Option<String>,
    pub architecture: &'static str,
}

impl TestImage {
    pub fn of(layers: impl IntoIterator<Item = Tarball>) -> TestImage {
        TestImage {
            layers: layers.into_iter().map(Tarball::finish).collect(),
            packing: Packing::Gzip,
            name: Some("docker.io/library/test:latest".to_owned()),
            architecture: "amd64",
        }
    }

    pub fn packed(self, packing: Packing) -> TestImage {
        TestImage { packing, ..self }
    }

    pub fn config(&self) -> Vec<u8> {
        let diff_ids: Vec<String> =
            self.layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        config.to_string().into_bytes()
    }

    /// The files of an OCI layout, by name.
    pub fn oci_files(&self) -> Result<Vec<(String, Vec<u8>)>, Failure> {
        let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
        let mut layers = Vec::new();
        for layer in &self.layers {
            let blob = self.packing.pack(layer)?;
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{}", self.packing.suffix());
            layers.push(descriptor(&media_type, &blob));
            files.push(blob_file(blob));
        }
        let config = self.config();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        if let Some(name) = &self.name {
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        files.push(blob_file(config));
        files.push(blob_file(manifest));
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        files.push(("index.json".to_owned(), index.to_string().into_bytes()));
        Ok(files)
    }

    /// The files of a docker-archive, by name.
    pub fn docker_files(&self) -> Result<Vec<(String, Vec<u8>)>, Failure> {
        let config = self.config();
        let config_name = format!("{}.json", sha256(&config));
        let mut files = vec![(config_name.clone(), config)];
        let mut layers = Vec::new();
        for layer in &self.layers {
            let name = format!("{}/layer.tar", sha256(layer));
            files.push((name.clone(), self.packing.pack(layer)?));
            layers.push(name);
        }
        let manifest = json!([{"Config": config_name, "RepoTags": self.name.iter().collect::<Vec<_>>(), "Layers": layers}]);
        files.push(("manifest.json".to_owned(), manifest.to_string().into_bytes()));
        Ok(files)
    }
}

pub fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": format!("sha256:{}", sha256(content)), "size": content.len()})
}

pub fn blob_file(content: Vec<u8>) -> (String, Vec<u8>) {
    (format!("blobs/sha256/{}", sha256(&content)), content)
}

/// Writes files below a directory.
pub fn write_directory(directory: &Path, files: &[(String, Vec<u8>)]) -> Result<(), Failure> {
    for (name, content) in files {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap_or(directory))?;
        fs::write(path, content)?;
    }
    Ok(())
}

/// The same files as a tar archive.
pub fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    Tarball::of(files.iter().map(|(name, content)| Item::file(name, content))).finish()
}
