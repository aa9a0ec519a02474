//! One microVM in one process.
pub mod config;
pub mod event;
