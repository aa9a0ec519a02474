//! A whole file system as one tar archive, without mounting anything.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use crate::tar::{Entry, EntryKind, TarWriter};
use crate::view::{FileKind, Node, View};

/// A directory on the way down: what is left of it, and how long its path is.
struct Level {
    directory: Node,
    names: std::vec::IntoIter<Vec<u8>>,
    path_length: usize,
}

impl View {
    /// Writes all files to an archive, in order of names.
    pub fn write_archive<W: Write>(&self, output: W) -> io::Result<W> {
        let mut tar = TarWriter::new(output);
        let mut links = HashMap::new();
        let mut path: Vec<u8> = Vec::new();
        let root = self.root()?;
        tar.entry(&self.info(&root)?.entry(b"./", b""), &mut io::empty())?;
        let mut levels = vec![self.level(root, 0)?];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path_length);
            let Some(name) = level.names.next() else {
                levels.pop();
                continue;
            };
            let Some(node) = self.child(&level.directory, &name)? else { continue };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            let failed = |source: io::Error| {
                io::Error::new(source.kind(), format!("/{}: {source}", String::from_utf8_lossy(&path)))
            };
            self.write_file(&mut tar, &path, &node, &mut links).map_err(failed)?;
            if self.info(&node)?.kind == FileKind::Directory {
                levels.push(self.level(node, path.len())?);
            }
        }
        tar.finish()
    }

    fn write_data(
        &self,
        tar: &mut TarWriter<impl Write>,
        entry: &Entry,
        size: u64,
        node: &Node,
    ) -> io::Result<()> {
        let extents = self.extents(node)?;
        if extents.iter().map(|(_, bytes)| bytes).sum::<u64>() == size {
            return tar.entry(entry, &mut self.open(node)?);
        }
        let mut written = tar.begin_sparse(entry, &extents)?;
        let mut piece = vec![0; 64 << 10];
        for extent in extents {
            let mut part = self.open_part(node, extent)?;
            loop {
                let count = part.read(&mut piece)?;
                if count == 0 {
                    break;
                }
                tar.data(piece.get(..count).unwrap_or_default())?;
                written += count as u64;
            }
        }
        tar.end(written)
    }

    fn level(&self, directory: Node, path_length: usize) -> io::Result<Level> {
        let names = self.names(&directory)?.into_iter();
        Ok(Level { directory, names, path_length })
    }

    /// Writes one file; `links` has the first name of each that has several.
    fn write_file(
        &self,
        tar: &mut TarWriter<impl Write>,
        path: &[u8],
        node: &Node,
        links: &mut HashMap<(usize, u64), Vec<u8>>,
    ) -> io::Result<()> {
        let info = self.info(node)?;
        if let Some(identity) = self.identity(node)
            && info.kind != FileKind::Directory
            && self.links(node)? > 1
        {
            if let Some(first) = links.get(&identity) {
                let kind = EntryKind::HardLink { target: first.clone() };
                // The file has these from its first entry.
                let entry = Entry { kind, xattrs: Vec::new(), ..info.entry(path, b"") };
                return tar.entry(&entry, &mut io::empty());
            }
            links.insert(identity, path.to_vec());
        }
        match info.kind {
            FileKind::File => self.write_data(tar, &info.entry(path, b""), info.size, node),
            FileKind::Symlink => tar.entry(&info.entry(path, &self.target(node)?), &mut io::empty()),
            FileKind::Directory => tar.entry(&info.entry(&[path, b"/"].concat(), b""), &mut io::empty()),
            _ => tar.entry(&info.entry(path, b""), &mut io::empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::digest::Digest;
    use crate::fuzzing::{layer_entry, memory};
    use crate::layer::{ExpectedLayer, convert};

    /// A view of one layer, which is this archive.
    fn view(archive: &[u8]) -> View {
        let blob: File = memory("layer");
        let expected = ExpectedLayer { blob: None, diff_id: Digest::of(archive) };
        convert(archive, &expected, &blob, &memory("recipe"), |_| {}).unwrap();
        View::new(vec![blob]).unwrap()
    }

    #[test]
    fn archive_of_a_view_is_unpacked_by_gnu_tar_and_read_as_the_same_view() {
        let mut data = vec![0; 3 << 20];
        data[1_000_000..1_070_000].fill(7);
        data[(2 << 20) + 5] = 9;
        let long = "l".repeat(150);
        let entries = [
            layer_entry(b'5', "d", "", b""),
            layer_entry(b'0', "file", "", b"text"),
            layer_entry(b'1', "again", "file", b""),
            layer_entry(b'2', "link", "file", b""),
            layer_entry(b'0', "sparse", "", &data),
            layer_entry(b'0', "zeros", "", &[0; 200_000]),
            layer_entry(b'6', "pipe", "", b""),
        ];
        let mut archive = entries.concat();
        archive.resize(archive.len() + 1024, 0);
        let written = view(&archive).write_archive(Vec::new()).unwrap();
        assert!(written.len() < 1 << 20, "holes are stored: {} bytes", written.len());
        assert_eq!(view(&written).write_archive(Vec::new()).unwrap(), written);

        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("root.tar");
        fs::write(&path, &written).unwrap();
        let unpacked = scratch.path().join(&long);
        fs::create_dir(&unpacked).unwrap();
        let status =
            std::process::Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(&unpacked).status();
        assert!(status.unwrap().success());
        assert_eq!(fs::read(unpacked.join("sparse")).unwrap(), data);
        assert_eq!(fs::read(unpacked.join("zeros")).unwrap(), [0; 200_000]);
        let number = |name: &str| fs::metadata(unpacked.join(name)).unwrap().ino();
        assert_eq!((number("file"), number("link")), (number("again"), number("again")));
    }
}
