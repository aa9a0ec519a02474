//! Images from Dockerfiles.
//!
//! ```text
//!   text ──▶ dockerfile ──▶ plan ──▶ stage, stage, … (in parallel) ──▶ image
//!                           which     │ metadata ──▶ config
//!                           are       │ COPY, ADD ──▶ tree ──▶ transfer ──▶ draft ──▶ layer
//!                           needed    └ RUN ──▶ mounts, step ──▶ a sandbox's changes ──▶ layer
//! ```
//!
//! This crate knows the language and the order of things. What a layer is on disk is `cloche-images`' business, and
//! what a sandbox is `cloche-engine`'s; each RUN is one, in a process of its own (`step`). COPY and ADD need no sandbox
//! and no mount: they read layers and write layers (`draft`).
//!
//! Every step has a key, a digest of all that its result depends on (`key`), under which the store has the result of
//! the last time. The isolation is no part of it: the same image comes out under both.

// What a Dockerfile, a context or an image can reach must not panic. (Tests may.)
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod config;
mod context;
pub mod dockerfile;
mod draft;
mod key;
mod mounts;
mod owner;
mod patterns;
mod plan;
mod sandbox;
mod stage;
pub mod step;
mod time;
mod transfer;
mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;

use cloche_engine::{home::Home, request::Isolation};
use cloche_images::{BuildError, Digest, Reference, StoreError};

pub use context::{ContextError, Input, Source};
use dockerfile::{Place, SyntaxError};
pub use mounts::{CacheUsage, cache_mounts, prune_cache_mounts, remove_remains};
pub use patterns::PatternError;
pub use stage::StepError;

/// A secret for `RUN --mount=type=secret`.
#[derive(Debug, Clone)]
pub enum Secret {
    /// In a file.
    File(PathBuf),
    /// Here.
    Value(Vec<u8>),
}

/// What is to be built, and how.
pub struct Request {
    /// Where images are, and what runs.
    pub home: Home,
    /// The isolation of RUN.
    pub isolation: Isolation,
    /// The context and the Dockerfile.
    pub input: Input,
    /// The stage to build; the last by default.
    pub target: Option<String>,
    /// For which platform.
    pub platform: Option<String>,
    /// `--build-arg`
    pub arguments: BTreeMap<String, String>,
    /// `--label`
    pub labels: Vec<(String, String)>,
    /// `--tag`
    pub names: Vec<Reference>,
    /// `--secret`, by id.
    pub secrets: BTreeMap<String, Secret>,
    /// Take no result of an earlier build.
    pub no_cache: bool,
    /// Take none for these stages.
    pub no_cache_stages: Vec<String>,
    /// What a RUN gets of memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// Guest kernel for RUN.
    pub kernel: Option<PathBuf>,
    /// The program that a RUN is a process of; it must call [`step::main`] when it is started with [`step::WORD`].
    pub program: PathBuf,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With a result that was known.
    Cached,
    /// With a new one.
    Done,
    /// Without.
    Failed,
}

/// Is told what goes on, from several threads.
pub trait Observer: Sync {
    /// A step begins. Numbers are unique, and no order.
    fn started(&self, step: usize, title: &str);
    /// A step says something: a line, without its end.
    fn output(&self, step: usize, line: &[u8]);
    /// A step ends.
    fn ended(&self, step: usize, how: Ended);
    /// Something is likely not as it is meant.
    fn warn(&self, text: &str);
    /// An image is needed; `is_missing` says that it is not here.
    fn image(&self, name: &str, is_missing: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildFailure {
    /// The Dockerfile or the context cannot be had.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The Dockerfile is none.
    #[error(transparent)]
    Syntax(#[from] SyntaxError),
    /// A step failed.
    #[error("Dockerfile {place}")]
    Step {
        /// Where it stands.
        place: Place,
        /// Why.
        #[source]
        source: Box<StepError>,
    },
    /// What was asked for cannot be.
    #[error("{0}")]
    Request(String),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image cannot be made.
    #[error("cannot make the image")]
    Image(#[source] BuildError),
    /// Another stage failed.
    #[error("it was given up, because something else failed")]
    GivenUp,
}

/// What was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Built {
    /// The image.
    pub id: Digest,
}

/// Builds an image.
pub fn build(request: &Request, observer: &dyn Observer) -> Result<Built, BuildFailure> {
    plan::build(request, observer)
}
