//! The `newc` cpio archive that Linux unpacks as initramfs (kernel: Documentation/driver-api/early-userspace/
//! buffer-format.rst). Also compiled into this crate's build script, which packs the guest agent.

/// An archive being written. Entries must come after the directories that hold them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory with mode 0755.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, (0, 0), &[]);
    }

    /// Adds a regular file with these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | permissions, (0, 0), content);
    }

    /// Adds a character device with mode 0600.
    #[allow(dead_code, reason = "only the build script packs devices")]
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, (major, minor), &[]);
    }

    /// The finished archive, padded to 4 bytes so that another may follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let name = path.trim_start_matches('/');
        let fields = [
            self.entries, // inode: distinct, or files would be taken for hard links
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime: none, so that archives are reproducible
            content.len() as u32,
            0, // major of the file system
            0, // minor of the file system
            major,
            minor,
            name.len() as u32 + 1,
            0, // checksum: unused in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
