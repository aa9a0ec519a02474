//! The contract between the host and the guest agent: what travels with the boot, which vsock ports carry
//! what, which I/O ports the machine listens on, and the control messages.
//!
//! This crate is data only. Both sides import it; neither side's behaviour lives here.
//!
//! ```text
//!  host (engine)                                   guest (agent, PID 1)
//!    initramfs:  /cloche/boot.json, /cloche/spec.json, … ──▶ read at boot
//!    vsock 1024  control ◀── FromGuest frames / ToGuest frames ──▶
//!    vsock 1025  stdin   ──────────── raw bytes ────────────────▶
//!    vsock 1026  stdout  ◀─────────── raw bytes ─────────────────
//!    vsock 1027  stderr  ◀─────────── raw bytes ─────────────────
//!    vsock 1030  status  ─── a frame, when the host dials ────────▶
//!    vsock 1031  changes ─── what the container has written, when the host dials and asks
//!    vsock 1032  requests ── frames, when the host dials; then raw bytes, if the stream is one of a process ──
//!  VMM: I/O port 0x5c0 ◀── marks;  0x5c4 ◀── exit code
//! ```
//!
//! The guest dials the host for every stream of the container, so nobody polls for readiness.

pub mod boot;
pub mod changes;
pub mod frame;
pub mod machine;
pub mod message;

/// Version of this contract. The agent refuses a [`boot::BootConfig`] of another version: host and guest are
/// built from one source tree, so a mismatch means a stale agent.
pub const VERSION: u32 = 4;
