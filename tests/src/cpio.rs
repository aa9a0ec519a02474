//! Writes cpio archives in the "newc" form, which is what the kernel unpacks as its initramfs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::fmt::Write as _;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive under construction, in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// Appends a directory. Its parent must have come before.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.entry(path, DIRECTORY, &[])
    }

    /// Appends a file that anyone may run.
    pub fn program(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.entry(path, PROGRAM, content)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Self {
        self.inodes += 1;
        let links = 1;
        let [owner, group, mtime, device, checksum] = [0; 5];
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [
            self.inodes,
            mode,
            owner,
            group,
            links,
            mtime,
            size,
            device,
            device,
            device,
            device,
            name_size,
            checksum,
        ];
        let mut header = String::from("070701");
        for field in fields {
            // Writing to a String cannot fail.
            let _ = write!(header, "{field:08x}");
        }
        self.padded(header.as_bytes(), path.as_bytes());
        self.padded(content, &[]);
        self
    }

    /// Appends both, a NUL behind a name, and zeros up to a multiple of four bytes.
    fn padded(&mut self, bytes: &[u8], name: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.extend_from_slice(name);
        if !name.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_of_odd_name_and_content_is_padded_to_words() {
        let mut archive = Archive::default();
        archive.program("init", b"hello");
        let bytes = archive.finish();
        // 110 bytes of header and five of name make 115: the content starts at 116.
        assert!(bytes.starts_with(b"070701"));
        assert_eq!(&bytes[110..116], b"init\0\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "the content's size");
        assert_eq!(bytes.len() % 4, 0);
    }
}
