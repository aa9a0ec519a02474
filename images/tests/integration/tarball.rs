//! Writes tar archives byte by byte, the odd and the broken ones too.

/// An archive in the making.
#[derive(Clone, Default)]
pub struct Tarball {
    bytes: Vec<u8>,
}

/// One entry. Made by the functions named after what it is, then changed at will.
#[derive(Clone, Debug)]
pub struct Item {
    pub name: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub seconds: i64,
    pub nanoseconds: u32,
    pub target: Vec<u8>,
    pub device: (u64, u64),
    pub data: Vec<u8>,
    /// The size field, if it is not the data's length.
    pub claimed_size: Option<u64>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Records beyond those that the other fields need.
    pub pax: Vec<(String, Vec<u8>)>,
}

impl Item {
    fn new(kind: u8, name: impl AsRef<[u8]>, mode: u32) -> Item {
        Item {
            name: name.as_ref().to_vec(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            seconds: 1_700_000_000,
            nanoseconds: 0,
            target: Vec::new(),
            device: (0, 0),
            data: Vec::new(),
            claimed_size: None,
            xattrs: Vec::new(),
            pax: Vec::new(),
        }
    }

    pub fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
        Item { data: data.as_ref().to_vec(), ..Item::new(b'0', name, 0o644) }
    }

    pub fn directory(name: impl AsRef<[u8]>) -> Item {
        Item::new(b'5', name, 0o755)
    }

    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item { target: target.as_ref().to_vec(), ..Item::new(b'2', name, 0o777) }
    }

    pub fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item { target: target.as_ref().to_vec(), ..Item::new(b'1', name, 0o644) }
    }

    pub fn char_device(name: impl AsRef<[u8]>, major: u64, minor: u64) -> Item {
        Item { device: (major, minor), ..Item::new(b'3', name, 0o666) }
    }

    pub fn block_device(name: impl AsRef<[u8]>, major: u64, minor: u64) -> Item {
        Item { device: (major, minor), ..Item::new(b'4', name, 0o660) }
    }

    pub fn fifo(name: impl AsRef<[u8]>) -> Item {
        Item::new(b'6', name, 0o600)
    }

    pub fn mode(self, mode: u32) -> Item {
        Item { mode, ..self }
    }

    pub fn owner(self, uid: u64, gid: u64) -> Item {
        Item { uid, gid, ..self }
    }

    pub fn time(self, seconds: i64, nanoseconds: u32) -> Item {
        Item { seconds, nanoseconds, ..self }
    }

    pub fn xattr(mut self, name: &str, value: impl AsRef<[u8]>) -> Item {
        self.xattrs.push((name.into(), value.as_ref().to_vec()));
        self
    }

    pub fn pax(mut self, keyword: &str, value: impl AsRef<[u8]>) -> Item {
        self.pax.push((keyword.to_owned(), value.as_ref().to_vec()));
        self
    }
}

impl Tarball {
    pub fn new() -> Tarball {
        Tarball::default()
    }

    pub fn of(items: impl IntoIterator<Item = Item>) -> Tarball {
        items.into_iter().fold(Tarball::new(), Tarball::add)
    }

    /// Adds an entry, with pax records for whatever a ustar header cannot hold.
    pub fn add(mut self, item: Item) -> Tarball {
        let mut records = Vec::new();
        if item.name.len() > 100 {
            push_record(&mut records, b"path", &item.name);
        }
        if item.target.len() > 100 {
            push_record(&mut records, b"linkpath", &item.target);
        }
        for (keyword, value) in [("uid", item.uid), ("gid", item.gid)] {
            if value > 0o777_7777 {
                push_record(&mut records, keyword.as_bytes(), value.to_string().as_bytes());
            }
        }
        if item.nanoseconds != 0 || !(0..=0o777_7777_7777).contains(&item.seconds) {
            push_record(&mut records, b"mtime", pax_time(item.seconds, item.nanoseconds).as_bytes());
        }
        for (name, value) in &item.xattrs {
            push_record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        for (keyword, value) in &item.pax {
            push_record(&mut records, keyword.as_bytes(), value);
        }
        if !records.is_empty() {
            self = self.special(b'x', &records);
        }
        self.bytes.extend(header(&item));
        self.data(&item.data)
    }

    /// Adds a special header with content: `x` pax, `g` global pax, `L` long name, `K` long target.
    pub fn special(mut self, kind: u8, content: &[u8]) -> Tarball {
        self.bytes.extend(header(&Item { data: content.to_vec(), ..Item::new(kind, "special", 0o644) }));
        self.data(content)
    }

    /// Adds a GNU long name header.
    pub fn long_name(self, name: &[u8]) -> Tarball {
        self.special(b'L', &[name, b"\0"].concat())
    }

    /// Adds bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Tarball {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn data(mut self, data: &[u8]) -> Tarball {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a file in the old GNU sparse format.
    pub fn old_gnu_sparse(mut self, name: &str, size: u64, extents: &[(u64, &[u8])]) -> Tarball {
        let stored: Vec<u8> = extents.iter().flat_map(|(_, data)| data.iter().copied()).collect();
        let mut block = header(&Item { kind: b'S', data: stored.clone(), ..Item::file(name, "") });
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..500].fill(0);
        let (first, rest) = extents.split_at(extents.len().min(4));
        put_extents(&mut block[386..], first);
        block[482] = u8::from(!rest.is_empty());
        octal(&mut block[483..495], size);
        set_checksum(&mut block);
        self.bytes.extend(block);
        let mut chunks = rest.chunks(21).peekable();
        while let Some(chunk) = chunks.next() {
            let mut block = [0; 512];
            put_extents(&mut block, chunk);
            block[504] = u8::from(chunks.peek().is_some());
            self.bytes.extend(block);
        }
        self.data(&stored)
    }

    /// Adds a file in one of the pax sparse formats: `0.0`, `0.1` or `1.0`.
    pub fn pax_sparse(self, format: &str, name: &str, size: u64, extents: &[(u64, &[u8])]) -> Tarball {
        let stored: Vec<u8> = extents.iter().flat_map(|(_, data)| data.iter().copied()).collect();
        let pairs: Vec<(u64, usize)> = extents.iter().map(|(offset, data)| (*offset, data.len())).collect();
        let size = size.to_string();
        match format {
            "0.0" => {
                let mut records = Vec::new();
                push_record(&mut records, b"GNU.sparse.size", size.as_bytes());
                push_record(&mut records, b"GNU.sparse.numblocks", pairs.len().to_string().as_bytes());
                for (offset, length) in pairs {
                    push_record(&mut records, b"GNU.sparse.offset", offset.to_string().as_bytes());
                    push_record(&mut records, b"GNU.sparse.numbytes", length.to_string().as_bytes());
                }
                let mut tar = self.special(b'x', &records);
                tar.bytes.extend(header(&Item::file(name, &stored)));
                tar.data(&stored)
            }
            "0.1" => {
                let map: Vec<String> =
                    pairs.iter().map(|(offset, length)| format!("{offset},{length}")).collect();
                let item = Item::file("GNUSparseFile.0/placeholder", stored)
                    .pax("GNU.sparse.size", size)
                    .pax("GNU.sparse.numblocks", pairs.len().to_string())
                    .pax("GNU.sparse.map", map.join(","))
                    .pax("GNU.sparse.name", name);
                self.add(item)
            }
            _ => {
                let mut data = format!("{}\n", pairs.len()).into_bytes();
                for (offset, length) in pairs {
                    data.extend(format!("{offset}\n{length}\n").into_bytes());
                }
                data.resize(data.len().next_multiple_of(512), 0);
                data.extend(stored);
                let item = Item::file("GNUSparseFile.0/placeholder", data)
                    .pax("GNU.sparse.major", "1")
                    .pax("GNU.sparse.minor", "0")
                    .pax("GNU.sparse.name", name)
                    .pax("GNU.sparse.realsize", size);
                self.add(item)
            }
        }
    }

    /// The archive with its end marker.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }

    /// The archive without its end marker.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}

fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds >= 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    let total = -(i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds));
    format!("-{}.{:09}", total / 1_000_000_000, total % 1_000_000_000)
}

/// Appends a pax record, whose length counts its own digits.
pub fn push_record(records: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend(length.to_string().bytes());
    records.extend([b" ", keyword, b"=", value, b"\n"].concat());
}

/// The ustar header of an item; what does not fit is cut off.
pub fn header(item: &Item) -> [u8; 512] {
    let mut block = [0; 512];
    put(&mut block[0..100], &item.name);
    octal(&mut block[100..108], u64::from(item.mode));
    octal(&mut block[108..116], item.uid & 0o777_7777);
    octal(&mut block[116..124], item.gid & 0o777_7777);
    octal(&mut block[124..136], item.claimed_size.unwrap_or(item.data.len() as u64));
    octal(&mut block[136..148], item.seconds.clamp(0, 0o777_7777_7777).cast_unsigned());
    block[156] = item.kind;
    put(&mut block[157..257], &item.target);
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], item.device.0);
    octal(&mut block[337..345], item.device.1);
    set_checksum(&mut block);
    block
}

/// Makes a header valid again after a change.
pub fn set_checksum(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

fn put_extents(field: &mut [u8], extents: &[(u64, &[u8])]) {
    for (pair, (offset, data)) in field.chunks_mut(24).zip(extents) {
        octal(&mut pair[..12], *offset);
        octal(&mut pair[12..], data.len() as u64);
    }
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

/// Octal if it fits, base-256 if not.
fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    if text.len() == digits {
        put(field, text.as_bytes());
    } else {
        field.fill(0);
        let start = field.len() - 8;
        field[start..].copy_from_slice(&value.to_be_bytes());
        field[0] |= 0x80;
    }
}
