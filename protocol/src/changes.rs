//! What a container has written, on [`crate::machine::guest_port::CHANGES`]: a layer's tar archive in chunks.
//!
//! ```text
//!  host: Ask (a frame) ──▶
//!        ◀── length:u32 bytes, length:u32 bytes, …, 0:u32, End (a frame)      little-endian
//! ```
//!
//! So an archive that was cut off is told from a whole one, and what went wrong arrives.

use serde::{Deserialize, Serialize};

/// Longest chunk in bytes.
pub const MAX_CHUNK_BYTES: u32 = 256 * 1024;

/// The host's question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Whether the container stands still meanwhile.
    pub freeze: bool,
}

/// The guest's last words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Why the archive is not whole; `None` if it is.
    pub error: Option<String>,
}
