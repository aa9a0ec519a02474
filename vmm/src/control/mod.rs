//! The control socket: what a VM that runs can be asked, by anybody who may open its socket.
//!
//! ```text
//!   client ── {"version":1,"request":…}\n ──▶ session ──▶ Request ──▶ machine
//!          ◀─ {"version":1,"answer":…}\n ──── session ◀── Outcome ◀──
//! ```
//! `api` is the schema, `session` the framing with its bounds, `client` the other end. Who listens, and what a request
//! does to the machine, is the machine's business (`machine/plane.rs`, `machine/requests.rs`). See `docs/control-api.md`.

pub mod api;
pub mod client;
pub(crate) mod session;
