//! Keys of steps: a digest of all that a step's result depends on.

use cloche_images::Digest;

/// A key in the making. Each part has its length in front, so that no two lists of parts are the same bytes.
#[derive(Debug, Clone)]
pub struct Key(Vec<u8>);

impl Key {
    /// A key of this kind, on top of another.
    pub fn new(kind: &str, parent: Option<Digest>) -> Key {
        // To be changed when a step of the same key would come out otherwise.
        let mut key = Key(b"cloche step 1".to_vec());
        key.text(kind);
        if let Some(parent) = parent {
            key.bytes(parent.as_bytes());
        }
        key
    }

    /// Adds a part.
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Adds a part.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.extend_from_slice(bytes);
        // Of large directories it would be as large as all their names.
        const LARGE: usize = 1 << 20;
        if self.0.len() > LARGE {
            self.0 = Digest::of(&self.0).as_bytes().to_vec();
        }
    }

    /// The key.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }
}
