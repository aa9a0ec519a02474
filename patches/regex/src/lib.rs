//! `regex-lite` under the name of `regex`, with the same interface.
//!
//! Only oci-spec asks for `regex`, to check two strings that are ASCII. The full crate brings Unicode's tables and four
//! engines into every binary that reads a runtime spec: a megabyte of the guest agent, which is copied into guest
//! memory at each VM's start.

pub use regex_lite::*;
