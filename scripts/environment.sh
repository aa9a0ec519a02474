# shellcheck shell=bash
# Sourced by the other scripts: where things are, and a PATH with the tools that scripts/setup installs.
# Sets root (the source tree), cache (Cloche's cache folder) and target_dir (cargo's).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cloche
target_dir=${CARGO_TARGET_DIR:-$root/target}
# The scripts that read these:
export root cache target_dir
export PATH="$cache/tools/bin:$PATH:$HOME/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin"

# The target of .cargo/config.toml, in which every binary of this project is built.
release_dir=$target_dir/x86_64-unknown-linux-gnu/release
export release_dir
