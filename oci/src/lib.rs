//! An OCI runtime's verbs. Each is the work of one short-lived process: containers live on by themselves, and what the
//! next verb has to know of them is a directory.
//!
//! ```text
//!  create ──▶ STATE/ID/{state.json, config.json, start.sock} ──▶ the container's first process waits at start.sock
//!  start  ──▶ connects to it: the process becomes the program
//!  state, kill, exec, …    find the process by the record, and see its status instead of remembering it
//!  delete ──▶ cgroup and directory are gone
//! ```
//!
//! A status is what can be seen: no process (or another one with its id) is *stopped*; one that still accepts
//! connections at its gate is *created*; one whose cgroup is frozen is *paused*; anything else is *running*. So a verb
//! may be killed at any moment without leaving a record that lies.

mod binary;
mod bundle;
mod console;
mod create;
mod entry_point;
mod error;
pub mod events;
mod exec;
mod features;
mod foreground;
mod gate;
mod isolation;
mod listener;
mod process;
mod state;
pub mod template;
pub mod time;
mod verbs;

pub use cloche_runtime::{chain, is_machine_root};

pub use binary::protect as protect_own_binary;
pub use bundle::parse as parse_config;
pub use create::{Creation, Preserved, create, run};
pub use error::Error;
pub use exec::{Execution, exec};
pub use features::features;
pub use foreground::Signals;
pub use isolation::{Child, First, Further, Inside, Isolation, OnHost, Seen};
pub use process::ProcessId;
pub use state::{Home, Known, State, Status};
pub use verbs::{delete, kill, list, pause, processes, resume, start, state, update};
