//! Every bound that hostile input meets, in one place, each with its reason.
//!
//! An image is untrusted: its archive, its manifests and its layers may be made to exhaust memory, disk or
//! patience. Nothing in this crate grows with a number that input merely *claims*; what grows with the bytes that
//! input *has* is bounded here.

/// Bytes of an image index, manifest, or a docker-archive's `manifest.json`. Registries and containerd refuse
/// manifests above 4 MiB (OCI distribution-spec: spec.md#pushing-manifests); so do we.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Bytes of an image configuration. Real ones are a few KiB; labels and history may swell them.
pub(crate) const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// Layers in an image: Docker's own limit.
pub(crate) const MAX_LAYERS: usize = 127;

/// Images in one archive, and descriptors in one index.
pub(crate) const MAX_MANIFESTS: usize = 1024;

/// Manifests and configurations of one archive together. They are all in memory before the first layer is read, and a
/// small archive can name one large configuration many times.
pub(crate) const MAX_METADATA_BYTES: usize = 64 << 20;

/// Depth of indexes that name indexes. Real images have at most two.
pub(crate) const MAX_INDEX_DEPTH: usize = 4;

/// Members of an archive that holds an image (blobs and small files, not what is in the layers).
pub(crate) const MAX_ARCHIVE_MEMBERS: usize = 1 << 16;

/// Bytes of such a member's name. The longest in use are two digests long.
pub(crate) const MAX_MEMBER_NAME: usize = 512;

/// Entries in one layer. ImageNet as loose files has 1.3 million; each costs us about 170 bytes of memory.
pub(crate) const MAX_ENTRIES: u64 = 4 << 20;

/// Memory for one layer's tree: names, link targets, extended attributes, data maps.
pub(crate) const MAX_TREE_BYTES: u64 = 1 << 30;

/// Memory for the tree of all layers of an image: ten million files in full directories.
pub(crate) const MAX_MERGED_BYTES: u64 = 2 << 30;

/// Bytes of one layer's tar stream after decompression. Gzip can expand a thousandfold, zstd by more.
pub(crate) const MAX_LAYER_BYTES: u64 = 256 << 30;

/// Free bytes that a conversion leaves on the store's file system.
pub(crate) const RESERVED_DISK_BYTES: u64 = 64 << 20;

/// A path with its terminating NUL, as the kernel counts (`PATH_MAX`); so a link target has at most 4095 bytes.
pub(crate) const PATH_MAX: usize = 4096;

/// Bytes of one path component (`NAME_MAX`); also EROFS' own limit.
pub(crate) const NAME_MAX: usize = 255;

/// Bytes of one pax or GNU long-name record block: what Go's `archive/tar`, and so every OCI tool, accepts.
pub(crate) const MAX_EXTENDED_HEADER_BYTES: u64 = 1 << 20;

/// Special headers (pax, GNU long name) in a row before one entry. Real archives have at most three.
pub(crate) const MAX_HEADERS_PER_ENTRY: u32 = 8;

/// Extents in one sparse file's map.
pub(crate) const MAX_SPARSE_EXTENTS: usize = 1 << 20;

/// Logical size of one file. No Linux file system that an image could have come from goes further in practice,
/// and the data map of a sparse file grows with it.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 50;

/// Bytes of one extended attribute's value (the kernel's `XATTR_SIZE_MAX` is 65536; EROFS stores 16 bits).
pub(crate) const MAX_XATTR_VALUE_BYTES: usize = 65535;

/// Bytes of all extended attributes of one file, as EROFS stores them: a 16-bit count of 4-byte units.
pub(crate) const MAX_XATTRS_BYTES: usize = 65535 * 4;

/// Chunks over all sparse files of one layer: 4 bytes each in the blob.
pub(crate) const MAX_CHUNKS: u64 = 64 << 20;

/// Path components walked because of symbolic links, over one whole layer. Entries below a link are rare; a
/// layer made of them must not cost more than its size.
pub(crate) const MAX_LINK_STEPS: u64 = 16 << 20;

/// Symbolic links followed for one entry (the kernel's `MAXSYMLINKS`).
pub(crate) const MAX_LINK_DEPTH: u32 = 40;

/// Window of a zstd frame, as a power of two: 64 MiB of memory. Level 19 uses 8 MiB.
pub(crate) const MAX_ZSTD_WINDOW_LOG: u32 = 26;

/// Memory for an xz stream, in KiB: its dictionary, which is 64 MiB at level 9, and some more.
pub(crate) const MAX_XZ_MEMORY_KIB: u32 = 96 << 10;
