//! What makes the container's process what the spec wants it to be, once it sees its own files: limits, user,
//! capabilities, and the program to become.

pub(crate) mod accounts;
pub(crate) mod capabilities;
pub(crate) mod labels;
pub(crate) mod program;
pub(crate) mod rlimits;
pub(crate) mod scheduling;
pub(crate) mod user;
