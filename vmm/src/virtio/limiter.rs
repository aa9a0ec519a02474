//! A rate limit with the clock that it needs: whoever has to wait is woken by a timer.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use vmm_sys_util::timerfd::TimerFd;

use crate::{config::LimitConfig, rate_limit::RateLimit};

/// Rings when a wait is over. Nobody reads it: it is watched for edges, and setting it again takes its bell back.
#[derive(Default)]
pub struct Limiter {
    limit: RateLimit,
    timer: Option<TimerFd>,
}

impl Limiter {
    /// A limiter; without limits it costs nothing.
    pub fn new(config: Option<LimitConfig>) -> io::Result<Self> {
        let limit = config.unwrap_or_default().to_rate_limit(now_ns());
        if limit.is_none() {
            return Ok(Self::default());
        }
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self { limit, timer: Some(timer) })
    }

    /// What to watch, if there is a limit.
    pub fn fd(&self) -> Option<RawFd> {
        self.timer.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether there may be another operation now. If not, the timer is set.
    pub fn permits(&mut self) -> bool {
        let Some(timer) = &mut self.timer else { return true };
        let wait_ns = self.limit.wait_ns(now_ns());
        // A timer that cannot be set must not stop the device for ever.
        wait_ns == 0 || timer.reset(Duration::from_nanos(wait_ns), None).is_err()
    }

    /// There was an operation with so many bytes.
    pub fn charge(&mut self, bytes: usize) {
        self.limit.charge(bytes as u64);
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The kernel's clock is positive and its nanoseconds are below 10^9.
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}
