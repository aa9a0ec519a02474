//! Entry points for fuzzing: bytes that an image's author made up. Only compiled with the feature `fuzzing`, for the
//! targets in `fuzz/`, and for this crate's own tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::Store;
use crate::digest::Digest;
use crate::layer::{ExpectedLayer, Rebuilt, convert};
use crate::load::plan_archive;
use crate::registry;

const BLOCK: usize = 512;

/// Converts `bytes` as a layer. Their headers' checksums are made right: no fuzzer guesses them.
pub fn layer(bytes: &[u8]) {
    let mut archive = bytes.to_vec();
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| &block[257..262] == b"ustar") {
        set_checksum(block);
    }
    let memory = |name| File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    let (output, recipe) = (memory("layer"), memory("recipe"));
    let expected = ExpectedLayer { blob: None, diff_id: Digest::of(&archive) };
    if let Ok((length, digests)) = convert(archive.as_slice(), &expected, &output, &recipe, |_| {}) {
        assert_eq!(output.metadata().unwrap().len(), length);
        assert!(length.is_multiple_of(512) && length > 0, "{length}");
        if digests.blob == digests.diff_id {
            let mut recipe = recipe;
            recipe.rewind().unwrap();
            let mut again = Vec::new();
            Rebuilt::open(recipe, output).unwrap().read_to_end(&mut again).unwrap();
            assert_eq!(again, archive);
        }
    }
}

/// Reads `bytes` as the metadata of an image: files separated by 0xff. The first is `index.json` if it starts with
/// `{`, else `manifest.json`; the others are blobs, and `@N` in a file before them stands for the digest of blob N.
pub fn archive(bytes: &[u8]) {
    let files = linked_files(bytes);
    let mut members: Vec<(String, Vec<u8>)> = files[1..]
        .iter()
        .map(|file| (format!("blobs/sha256/{}", Digest::of(file).hex()), file.clone()))
        .collect();
    let first = if files[0].first() == Some(&b'{') { "index.json" } else { "manifest.json" };
    members.push((first.into(), files[0].clone()));
    members.push(("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));

    let mut tar = Vec::new();
    for (name, content) in members {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        set_checksum(&mut header);
        tar.extend(header);
        tar.extend(&content);
        tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    }
    tar.resize(tar.len() + 2 * BLOCK, 0);
    let folder = folder();
    let path = folder.join("archive.tar");
    fs::write(&path, tar).unwrap();
    let store = Store::open(&folder.join("store")).unwrap();
    let _ = plan_archive(&path, &store);
}

/// Reads `bytes` as what a registry has under a tag, and what that leads to, in the form of [`archive`]; and as an
/// answer's head and body.
pub fn registry(bytes: &[u8]) {
    registry::fuzzing::manifests(&linked_files(bytes));
    registry::fuzzing::answer(bytes);
}

/// Files separated by 0xff, in which `@N` stands for the digest of a later file N.
fn linked_files(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut files: Vec<Vec<u8>> = bytes.split(|byte| *byte == 0xff).take(9).map(<[u8]>::to_vec).collect();
    for index in (1..files.len()).rev() {
        let hex = Digest::of(&files[index]).hex();
        for earlier in &mut files[..index] {
            *earlier = replace(earlier, format!("@{index}").as_bytes(), hex.as_bytes());
        }
    }
    files
}

fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("cloche-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn set_checksum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        replaced.extend(&rest[..at]);
        replaced.extend(to);
        rest = &rest[at + from.len()..];
    }
    replaced.extend(rest);
    replaced
}

/// Inputs from which a fuzzer should start.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "image_layer" => {
            vec![layer_seed(b'0', "a/b", b"content"), layer_seed(b'2', ".wh.c", b""), pax_seed()]
        }
        "image_archive" => archive_seeds(),
        "registry_answer" => registry_seeds(),
        _ => Vec::new(),
    }
}

fn layer_seed(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    for (at, field) in [(100, "0000755"), (108, "0000000"), (116, "0000000")] {
        header[at..at + 7].copy_from_slice(field.as_bytes());
    }
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"14000000000");
    header[156] = kind;
    header[157..160].copy_from_slice(b"a/b");
    header[257..265].copy_from_slice(b"ustar\x0000");
    set_checksum(&mut header);
    let mut tar = header.to_vec();
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    tar
}

fn pax_seed() -> Vec<u8> {
    let records = b"16 path=long/er\n30 SCHILY.xattr.user.name=abc\n";
    [layer_seed(b'x', "pax", records), layer_seed(b'5', "d", b""), layer_seed(b'1', "d/l", b"")].concat()
}

fn archive_seeds() -> Vec<Vec<u8>> {
    let config = r#"{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"],"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":["sha256:0000000000000000000000000000000000000000000000000000000000000000"]}}"#;
    let docker = r#"[{"Config":"blobs/sha256/@1","RepoTags":["a:b"],"Layers":["blobs/sha256/@2"]}]"#;
    let index = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:@1","size":SIZE,"annotations":{"org.opencontainers.image.ref.name":"a:b"}}]}"#;
    let manifest = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:@2","size":CONFIG},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:@3","size":5}]}"#;
    let manifest = manifest.replace("CONFIG", &config.len().to_string());
    // A digest has 64 characters where its placeholder has 2.
    let bytes = manifest.len() + 2 * 62;
    let index = index.replace("SIZE", &bytes.to_string());
    [vec![docker, config, "layer"], vec![index.as_str(), &manifest, config, "layer"]]
        .iter()
        .map(|files| files.iter().map(|file| file.as_bytes().to_vec()).collect::<Vec<_>>().join(&0xff))
        .collect()
}

fn registry_seeds() -> Vec<Vec<u8>> {
    // The OCI seed without its layout: an index (which needs a platform, or none) and a manifest.
    let Some(index) = archive_seeds().into_iter().nth(1) else { return Vec::new() };
    let mut files: Vec<Vec<u8>> = index.split(|byte| *byte == 0xff).map(<[u8]>::to_vec).collect();
    files.remove(0);
    // What a manifest names moves up by one.
    for index in 1..files.len() {
        files[0] = replace(&files[0], format!("@{}", index + 1).as_bytes(), format!("@{index}").as_bytes());
    }
    let head = b"HTTP/1.1 401 x\r\nContent-Length: 9\r\nLocation: ../a?b\r\nContent-Range: bytes 7-9/10\r\n\
        WWW-Authenticate: Bearer realm=\"https://a/\",service=\"s\",scope=repository:a:pull\r\n\r\n\
        {\"token\":\"abc\",\"errors\":[{\"code\":\"DENIED\",\"message\":\"no\"}]}";
    vec![index, files.join(&0xff), head.to_vec()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exercise(target: &str, entry: fn(&[u8]), rounds: usize) {
        let seeds = seeds(target);
        for round in 0..rounds {
            let mut bytes = seeds[round % seeds.len()].clone();
            // The first rounds are the seeds themselves.
            for change in 0..round / seeds.len() % 5 {
                let at = (round * 7919 + change * 104_729) % bytes.len();
                bytes[at] = bytes[at].wrapping_add(round as u8);
            }
            entry(&bytes);
        }
    }

    #[test]
    fn layer_survives_seeds_and_damage() {
        exercise("image_layer", layer, 300);
    }

    #[test]
    fn registry_survives_seeds_and_damage() {
        exercise("registry_answer", registry, 3000);
        for seed in &seeds("registry_answer")[..2] {
            let layers = crate::registry::fuzzing::manifests(&linked_files(seed));
            assert_eq!(layers, Some(1), "{}", String::from_utf8_lossy(seed));
        }
    }

    #[test]
    fn archive_survives_seeds_and_damage() {
        exercise("image_archive", archive, 100);
        let store = folder().join("store");
        let path = folder().join("archive.tar");
        archive(&seeds("image_archive")[0]);
        assert!(plan_archive(&path, &Store::open(&store).unwrap()).is_ok(), "the docker seed is an image");
        archive(&seeds("image_archive")[1]);
        let planned = plan_archive(&path, &Store::open(&store).unwrap());
        assert!(planned.is_ok(), "the OCI seed is an image: {:?}", planned.err());
        fs::remove_dir_all(folder()).unwrap();
    }
}
