//! Which parts of a file are there at all (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).

use std::{fs::File, io};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Extents of one file at most, as readers of archives have such a limit, too. What is beyond is one extent, zeros
/// included.
const MAX_EXTENTS: usize = 1 << 20;

/// A part of a file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// The extents of a file of `size` bytes, in order. A file that ends in a hole has an empty one at its end, by which GNU
/// tar knows how long it is.
pub(super) fn extents(file: &File, size: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut position = 0;
    while position < size {
        let start = match seek(file, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => break,
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => position,
            start => start?.min(size),
        };
        let end = match seek(file, SeekFrom::Hole(start)) {
            _ if extents.len() + 1 >= MAX_EXTENTS => size,
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => size,
            end => end?.min(size),
        };
        if start < end {
            extents.push(Extent { offset: start, length: end - start });
        }
        // A file that is written to meanwhile must not keep this from its end.
        position = end.max(position + 1);
    }
    if extents.last().is_none_or(|last| last.offset + last.length < size) {
        extents.push(Extent { offset: size, length: 0 });
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn extents_of_a_file_with_holes_are_its_data() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let end = Extent { offset: 1 << 20, length: 0 };
        assert_eq!(extents(&file, 1 << 20).unwrap(), [end]);
        file.write_all_at(&[1; 4096], 64 << 10).unwrap();
        let data = Extent { offset: 64 << 10, length: 4096 };
        assert_eq!(extents(&file, 1 << 20).unwrap(), [data, end]);
        file.write_all_at(&[1; 4096], (1 << 20) - 4096).unwrap();
        let last = Extent { offset: (1 << 20) - 4096, length: 4096 };
        assert_eq!(extents(&file, 1 << 20).unwrap(), [data, last]);
    }
}
