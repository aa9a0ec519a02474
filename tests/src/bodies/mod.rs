//! What must hold, by theme. Each body is one story, told under the isolations it is registered for.

mod bad_archives;
mod bad_requests;
mod builds;
mod changes;
mod commands;
mod crash;
mod devices;
mod exit_status;
mod hardening;
mod identity;
mod images;
mod limits;
mod mounts;
mod random_kills;
mod registries;
mod rootfs;
mod rootless;
mod signals;
mod stdio;
mod steering;
mod trace;
mod volumes;
mod workloads;

use crate::suite::Body;

/// Every body of the suite.
pub fn all() -> Vec<Body> {
    let themes = [
        exit_status::BODIES,
        stdio::BODIES,
        identity::BODIES,
        signals::BODIES,
        limits::BODIES,
        hardening::BODIES,
        rootfs::BODIES,
        mounts::BODIES,
        volumes::BODIES,
        images::BODIES,
        changes::BODIES,
        registries::BODIES,
        builds::BODIES,
        commands::BODIES,
        trace::BODIES,
        bad_requests::BODIES,
        bad_archives::BODIES,
        steering::BODIES,
        crash::BODIES,
        rootless::BODIES,
        random_kills::BODIES,
        workloads::BODIES,
    ];
    themes.into_iter().flatten().copied().chain(devices::all()).collect()
}
