//! Entry points for fuzzing: bytes that an image's author made up. Only compiled with the feature `fuzzing`, for the
//! targets in `fuzz/`, and for this crate's own tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::Store;
use crate::digest::Digest;
use crate::erofs::Reader;
use crate::layer::{DecodeError, ExpectedLayer, Rebuilt, convert, decompressor, detect};
use crate::load::plan_archive;
use crate::merge::{self, MergeLayer};
use crate::registry;

const BLOCK: usize = 512;

/// Converts `bytes` as a layer. Their headers' checksums are made right: no fuzzer guesses them.
pub fn layer(bytes: &[u8]) {
    let mut archive = bytes.to_vec();
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| &block[257..262] == b"ustar") {
        set_checksum(block);
    }
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

/// Decompresses `bytes`, by whatever method they name, and converts what is in them as a layer. That they come in small
/// pieces must not matter.
pub fn compressed(bytes: &[u8]) {
    const LONGEST: u64 = 1 << 20;
    let unpack = |piece: usize| {
        let (encoding, source) = detect(bytes)?;
        let mut unpacked = Vec::new();
        let decoder = decompressor(encoding, BufReader::with_capacity(piece, source))?;
        decoder.take(LONGEST).read_to_end(&mut unpacked)?;
        Ok::<_, DecodeError>(unpacked)
    };
    let (whole, in_pieces) = (unpack(bytes.len().max(1)), unpack(7));
    assert_eq!(whole.is_ok(), in_pieces.is_ok(), "{:?} {:?}", whole.err(), in_pieces.err());
    let (Ok(whole), Ok(in_pieces)) = (whole, in_pieces) else { return };
    assert!(whole == in_pieces);
    if (whole.len() as u64) < LONGEST {
        let blob = Some((Digest::of(bytes), bytes.len() as u64));
        let expected = ExpectedLayer { blob, diff_id: Digest::of(&whole) };
        let _ = convert(bytes, &expected, &memory("layer"), &memory("recipe"), |_| {});
    }
}

/// Merges layers of which each byte pair of `bytes` is an entry: what it is, and of which name. Few names, so that they
/// meet; 0xff starts the next layer.
pub fn merge(bytes: &[u8]) {
    let layers = bytes.split(|byte| *byte == 0xff).take(6).map(|layer| {
        let mut archive: Vec<u8> =
            layer.chunks_exact(2).flat_map(|pair| merge_entry(pair[0], pair[1])).collect();
        archive.resize(archive.len() + 2 * BLOCK, 0);
        let diff_id = Digest::of(&archive);
        let blob = memory("layer");
        let expected = ExpectedLayer { blob: None, diff_id };
        convert(archive.as_slice(), &expected, &blob, &memory("recipe"), |_| {}).ok()?;
        Some(MergeLayer { diff_id, blob })
    });
    // A layer that is refused by itself is the business of `layer`.
    let Some(layers) = layers.collect::<Option<Vec<_>>>() else { return };
    let output = memory("merged");
    if merge::merge(&layers, &output, [0; 16]).is_err() {
        return;
    }
    let reader = Reader::open(&output).unwrap();
    let devices: u64 = reader
        .devices()
        .unwrap()
        .iter()
        .map(|tag| {
            let named = layers.iter().find(|layer| Some(layer.diff_id) == merge::layer_of(tag));
            named.unwrap().blob.metadata().unwrap().len()
        })
        .sum();
    let end = output.metadata().unwrap().len() + devices;
    let mut pending = vec![(reader.root(), 0)];
    let mut seen = HashMap::new();
    while let Some((number, depth)) = pending.pop() {
        let inode = reader.inode(number).unwrap();
        for (name, _) in reader.xattrs(&inode).unwrap() {
            assert!(!name.starts_with(b"trusted.overlay."), "a mark is left");
        }
        let names = seen.entry(number).or_insert((0, inode.links));
        names.0 += 1;
        match inode.mode >> 12 {
            0o04 => {
                // Each directory once, and no cycle.
                assert!(names.0 == 1 && depth < 10_000);
                let entries = reader.entries(&inode).unwrap();
                pending.extend(entries.into_iter().map(|(_, child)| (child, depth + 1)));
            }
            0o10 => {
                let data = reader.data(&inode, 0).unwrap();
                assert!(data.end(inode.size) <= end);
            }
            0o02 => assert_ne!(inode.device_number(), 0, "a whiteout is left"),
            _ => {}
        }
    }
    for (names, links) in seen.into_values() {
        assert!(names == links || names == 1, "{names} names, {links} links");
    }
}

fn merge_entry(what: u8, name: u8) -> Vec<u8> {
    const NAMES: [&str; 8] = ["a", "b", "a/b", "b/a", "a/b/c", "c", "c/d", "b/c/a"];
    let pick = |at: u8| NAMES[usize::from(at) % NAMES.len()];
    let (name, target) = (pick(name), pick(name >> 3));
    let (directory, last) = name.rsplit_once('/').unwrap_or((".", name));
    match what % 8 {
        0 | 1 => layer_entry(b'5', name, "", b""),
        2 => layer_entry(b'0', name, "", &vec![what; usize::from(what) * 40]),
        3 => layer_entry(b'0', &format!("{directory}/.wh.{last}"), "", b""),
        4 => layer_entry(b'0', &format!("{name}/.wh..wh..opq"), "", b""),
        5 => layer_entry(b'1', name, target, b""),
        6 => layer_entry(b'2', name, target, b""),
        _ => layer_entry(b'2', name, &format!("/{target}/.."), b""),
    }
}

pub(crate) fn layer_entry(kind: u8, name: &str, target: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[156] = kind;
    header[157..157 + target.len()].copy_from_slice(target.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    set_checksum(&mut header);
    let mut tar = header.to_vec();
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    tar
}

pub(crate) fn memory(name: &str) -> File {
    File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap())
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
        "image_merge" => vec![
            b"\x00\x00\x32\x02\x05\x11\xff\x03\x02\x05\x10\x04\x00\x02\x04\xff\x06\x20\x02\x06".to_vec(),
            b"\x06\x01\x00\x00\xff\x32\x03\x05\x1b\xff\x07\x02\x05\x1c\x03\x00".to_vec(),
        ],
        "image_layer" => {
            vec![layer_seed(b'0', "a/b", b"content"), layer_seed(b'2', ".wh.c", b""), pax_seed()]
        }
        "image_compression" => compressed_seeds(),
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

fn compressed_seeds() -> Vec<Vec<u8>> {
    let tar = [layer_seed(b'0', "a/b", b"content"), vec![0; 2 * BLOCK]].concat();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let gzip = gzip.write_all(&tar).and_then(|()| gzip.finish()).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    let bzip2 = bzip2.write_all(&tar).and_then(|()| bzip2.finish()).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 3).unwrap();
    let xz = include_bytes!("../../tests/src/dockerfiles/archive.tar.xz").to_vec();
    // Several members are one stream.
    let twice = [&gzip, &zstd, &bzip2, &xz].map(|one| [one.as_slice(), one].concat());
    [gzip, zstd, bzip2, xz, tar].into_iter().chain(twice).collect()
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
    fn compressed_layer_survives_seeds_and_damage() {
        exercise("image_compression", compressed, 1000);
    }

    #[test]
    fn merge_survives_seeds_and_damage() {
        exercise("image_merge", merge, 3000);
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
