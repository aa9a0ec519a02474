//! Network devices.

use std::{collections::HashSet, fmt, os::fd::RawFd, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{ConfigError, LimitConfig, VmConfig};
use crate::backends::tap;

/// Network devices that a VM can have at most.
pub const MAX_NETS: usize = 4;
/// Smallest MTU that a device may tell (virtio 1.2 §5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// One virtio network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What is at the other end of its cable.
    pub backend: NetBackend,
    /// The guest's address.
    pub mac: MacAddress,
    /// The largest packet without Ethernet's header, [`MIN_MTU`] and above; told to the guest. `None`: its driver's
    /// default, 1500.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives; frames beyond them wait at the other end, and are dropped there.
    #[serde(default)]
    pub receive_limit: Option<LimitConfig>,
    /// Limits on what the guest sends; frames beyond them wait in the guest.
    #[serde(default)]
    pub send_limit: Option<LimitConfig>,
}

/// The other end of a network device's cable.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NetBackend {
    /// An inherited file descriptor of a tap, attached with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    TapFd(RawFd),
    /// A tap of the network namespace that the process is in.
    TapName(String),
    /// An inherited, connected unix stream socket: each frame behind its length, 4 bytes, big-endian.
    SocketFd(RawFd),
    /// A unix stream socket to connect to, such as passt's.
    SocketPath(PathBuf),
}

impl NetBackend {
    pub(super) fn inherited_fd(&self) -> Option<RawFd> {
        match self {
            Self::TapFd(fd) | Self::SocketFd(fd) => Some(*fd),
            Self::TapName(_) | Self::SocketPath(_) => None,
        }
    }
}

impl fmt::Display for NetBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TapFd(fd) => write!(f, "tap on file descriptor {fd}"),
            Self::TapName(name) => write!(f, "tap {name:?}"),
            Self::SocketFd(fd) => write!(f, "socket on file descriptor {fd}"),
            Self::SocketPath(path) => write!(f, "socket {path:?}"),
        }
    }
}

/// An Ethernet address of one interface; in JSON `"02:00:00:00:00:01"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// Text that is no address of an interface.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is no address of an interface; write six hexadecimal bytes, not all zero and the first one even, as in 02:00:00:00:00:01"
)]
pub struct BadMacAddress(String);

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, BadMacAddress> {
        let bad = || BadMacAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        // The lowest bit of the first byte marks a group of interfaces (IEEE 802).
        if parts.next().is_some() || bytes == [0; 6] || bytes[0] & 1 != 0 {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = BadMacAddress;

    fn try_from(text: String) -> Result<Self, BadMacAddress> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl VmConfig {
    pub(super) fn validate_nets(&self) -> Result<(), ConfigError> {
        if self.nets.len() > MAX_NETS {
            return Err(ConfigError::new("nets", self.nets.len(), format!("at most {MAX_NETS} devices")));
        }
        let mut macs = HashSet::new();
        for (index, net) in self.nets.iter().enumerate() {
            let wrong = |field: &str, value: &dyn fmt::Display, allowed: String| {
                Err(ConfigError::new(format!("nets[{index}].{field}"), value, allowed))
            };
            if !macs.insert(net.mac) {
                return wrong("mac", &net.mac, "an address that no other device has".into());
            }
            if let Some(mtu) = net.mtu.filter(|mtu| *mtu < MIN_MTU) {
                return wrong("mtu", &mtu, format!("{MIN_MTU} to {}", u16::MAX));
            }
            if let NetBackend::TapName(name) = &net.backend {
                let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b'%');
                if name.is_empty() || name.len() > tap::MAX_NAME_BYTES || !plain {
                    let allowed = format!("a name of 1 to {} printable characters", tap::MAX_NAME_BYTES);
                    return wrong("backend", &net.backend, allowed);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(backend: NetBackend, mac: u8) -> NetConfig {
        let mac = MacAddress([2, 0, 0, 0, 0, mac]);
        NetConfig { backend, mac, mtu: None, receive_limit: None, send_limit: None }
    }

    fn refused(nets: Vec<NetConfig>) -> String {
        let mut config = VmConfig::new(1, 128, "/vmlinux");
        config.events_fd = Some(3);
        config.nets = nets;
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn mac_address_is_read_as_it_is_written() {
        for text in ["02:00:00:00:00:01", "fe:dc:ba:98:76:54"] {
            assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "00:00:00:00:00:00",
            "01:00:00:00:00:01",
            "2:0:0:0:0:1",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "+2:00:00:00:00:01",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn validate_of_nets_refuses_doubles_and_impossible_values() {
        let tap = |name: &str| NetBackend::TapName(name.into());
        assert!(
            refused(vec![net(tap("a"), 1), net(tap("b"), 1)]).starts_with("nets[1].mac is 02:00:00:00:00:01")
        );
        assert!(refused((0..5).map(|n| net(tap("a"), n)).collect()).starts_with("nets is 5"));
        for name in ["", "1234567890123456", "a b", "tap%d", "a/b"] {
            assert!(refused(vec![net(tap(name), 1)]).starts_with("nets[0].backend is tap"), "{name:?}");
        }
        for fd in [-1, 2, 3] {
            assert!(
                refused(vec![net(NetBackend::TapFd(fd), 1)])
                    .starts_with(&format!("nets[0].backend is {fd};"))
            );
        }
        let twice = vec![net(NetBackend::TapFd(7), 1), net(NetBackend::SocketFd(7), 2)];
        assert!(refused(twice).starts_with("nets[1].backend is 7"));
        let small = NetConfig { mtu: Some(67), ..net(tap("a"), 1) };
        assert_eq!(refused(vec![small]), "nets[0].mtu is 67; allowed: 68 to 65535");
    }

    #[test]
    fn net_as_json_keeps_its_spelling() {
        let json = r#"{"backend":{"tap-fd":7},"mac":"02:00:00:00:00:01","mtu":null,"receive_limit":null,"send_limit":null}"#;
        let net: NetConfig = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&net).unwrap(), json);
        let unknown = json.replace("tap-fd", "bridge");
        assert!(serde_json::from_str::<NetConfig>(&unknown).is_err());
    }
}
