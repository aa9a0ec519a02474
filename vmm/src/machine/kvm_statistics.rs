//! KVM's own statistics, in its binary format (Linux `Documentation/virt/kvm/api.rst` §4.133: a header, descriptors of
//! one size, and 64-bit values, all in the host's byte order). KVM has them since Linux 5.14.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

/// Descriptors that are read at most; KVM has some fifty.
const MAX_DESCRIPTORS: usize = 1024;
/// Bytes of a name at most; KVM says 48.
const MAX_NAME_BYTES: usize = 256;
/// Flags (4), exponent (2), size (2), offset (4), bucket size (4); the name follows.
const DESCRIPTOR_BYTES: usize = 16;

/// An open statistics file of a vCPU or a machine. Reading it does not disturb what it tells of.
#[derive(Debug)]
pub struct KvmStatistics {
    file: File,
}

impl KvmStatistics {
    /// Reads from a descriptor that `KVM_GET_STATS_FD` gave.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// One of the statistics that are a single number.
    pub fn value(&self, name: &str) -> Option<u64> {
        self.read(|found| found == name).remove(name)
    }

    /// All statistics that are a single number; histograms are left out.
    pub fn values(&self) -> BTreeMap<String, u64> {
        self.read(|_| true)
    }

    fn read(&self, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, u64> {
        self.try_read(wanted).unwrap_or_default()
    }

    fn try_read(&self, wanted: impl Fn(&str) -> bool) -> Option<BTreeMap<String, u64>> {
        let mut header = [0; 24];
        self.file.read_exact_at(&mut header, 0).ok()?;
        let [_flags, name_size, count, _id, descriptors, data] = words(&header);
        let size = DESCRIPTOR_BYTES + (name_size as usize).min(MAX_NAME_BYTES);
        let mut table = vec![0; size * (count as usize).min(MAX_DESCRIPTORS)];
        self.file.read_exact_at(&mut table, descriptors.into()).ok()?;
        let mut values = BTreeMap::new();
        for descriptor in table.chunks_exact(size) {
            let (head, name) = descriptor.split_at_checked(DESCRIPTOR_BYTES)?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            let [_flags, exponent_and_size, offset, _bucket] = words(head.first_chunk::<16>()?);
            // The upper half, as little-endian hosts have it: this program is for x86-64.
            if exponent_and_size >> 16 == 1 && wanted(&name) {
                let mut value = [0; 8];
                self.file.read_exact_at(&mut value, u64::from(data) + u64::from(offset)).ok()?;
                values.insert(name, u64::from_ne_bytes(value));
            }
        }
        Some(values)
    }
}

fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_ne_bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn statistics(names: &[(&str, u16)], values: &[u64]) -> KvmStatistics {
        const NAME_BYTES: usize = 8;
        let descriptors = 24u32;
        let data = descriptors + names.len() as u32 * (16 + NAME_BYTES as u32);
        let mut bytes = Vec::new();
        for word in [0, NAME_BYTES as u32, names.len() as u32, 0, descriptors, data] {
            bytes.extend(word.to_ne_bytes());
        }
        for (index, (name, size)) in names.iter().enumerate() {
            bytes.extend([0; 6]);
            bytes.extend(size.to_ne_bytes());
            bytes.extend((index as u32 * 8).to_ne_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME_BYTES, 0);
            bytes.extend(padded);
        }
        values.iter().for_each(|value| bytes.extend(value.to_ne_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        KvmStatistics::new(file)
    }

    #[test]
    fn value_is_found_by_its_whole_name() {
        let statistics =
            statistics(&[("io_exit", 1), ("exits_x", 1), ("exits", 1), ("halt", 1)], &[1, 2, 3, 4]);
        assert_eq!(statistics.value("exits"), Some(3));
        assert_eq!(statistics.value("exit"), None);
    }

    #[test]
    fn values_are_all_single_numbers() {
        let statistics = statistics(&[("one", 1), ("histo", 2), ("eightlet", 1)], &[1, 2, 3]);
        let expected = BTreeMap::from([("one".to_owned(), 1), ("eightlet".to_owned(), 3)]);
        assert_eq!(statistics.values(), expected);
    }

    #[test]
    fn values_of_what_is_no_statistics_file_are_none() {
        assert!(KvmStatistics::new(tempfile::tempfile().unwrap()).values().is_empty());
    }
}
