//! What a network namespace has set, as messages that set the same in a guest (rtnetlink(7), linux/rtnetlink.h).

use std::io;

use super::super::attendant::Refusal;
use super::{
    kind,
    netlink::{Attributes, Kernel, Message, Told, flag},
};

const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const GET_ROUTE: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const GET_NEIGHBOUR: u16 = 30;

/// Headers' sizes.
const LINK_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 8;
const ROUTE_BYTES: usize = 12;
const NEIGHBOUR_BYTES: usize = 12;

/// Attributes of links (linux/if_link.h).
mod link {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const NAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const INFO: u16 = 18;
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const OF_FAMILIES: u16 = 26;
    pub(super) const INET6_ADDRESS_MODE: u16 = 8;
    pub(super) const NEW_INDEX: u16 = 49;
    /// linux/if.h.
    pub(super) const UP: u32 = 1;
    pub(super) const LOOPBACK: u32 = 8;
}

const INET: u8 = 2;
const INET6: u8 = 10;
/// The guest's interfaces, in the container's namespace: behind what a kernel puts there by itself.
const FIRST_INDEX: i32 = 16;

/// An interface.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: i32,
    pub(super) name: String,
    /// Empty if it is no virtual one.
    pub(super) kind: String,
    pub(super) address: [u8; 6],
    pub(super) mtu: u16,
    pub(super) is_up: bool,
    pub(super) is_loopback: bool,
}

/// Messages one behind the other, as `cloche_protocol::boot` has them.
#[derive(Debug, Default)]
pub(in super::super::super) struct GuestMessages {
    pub(in super::super::super) links: Vec<u8>,
    pub(in super::super::super) network: Vec<u8>,
}

/// All interfaces of a namespace.
pub(super) fn links(kernel: &Kernel) -> io::Result<Vec<Link>> {
    kernel.list(GET_LINK, &[0; LINK_BYTES])?.iter().map(link).collect()
}

fn link(told: &Told) -> io::Result<Link> {
    let [_, _, _, _, i0, i1, i2, i3, f0, f1, f2, f3, ..] = told.header::<LINK_BYTES>()?;
    let attributes = told.attributes(LINK_BYTES);
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    Ok(Link {
        index: i32::from_ne_bytes([i0, i1, i2, i3]),
        name: attributes.find_name(link::NAME).unwrap_or_default(),
        kind: attributes.within(link::INFO).find_name(link::INFO_KIND).unwrap_or_default(),
        address: attributes.value(link::ADDRESS).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default(),
        mtu: attributes.find_u32(link::MTU).and_then(|mtu| mtu.try_into().ok()).unwrap_or(u16::MAX),
        is_up: flags & link::UP != 0,
        is_loopback: flags & link::LOOPBACK != 0,
    })
}

/// `struct ifinfomsg`.
fn link_header(index: i32, is_up: bool) -> Vec<u8> {
    let up = if is_up { link::UP } else { 0 };
    [[0; 4], index.to_ne_bytes(), up.to_ne_bytes(), up.to_ne_bytes()].concat()
}

/// Gives an interface that is down its name, if any, and its MTU. With `silent`, its kernel makes no IPv6 address up for it.
pub(super) fn configure(index: i32, name: Option<&str>, mtu: u16, silent: bool) -> Message {
    /// Linux net/ipv6/addrconf.c: below that, an interface has nothing of IPv6 that could be set.
    const LEAST_MTU_OF_INET6: u16 = 1280;
    /// linux/if_link.h: IN6_ADDR_GEN_MODE_NONE.
    const NONE: u8 = 1;
    let mut message = Message::new(kind::NEW_LINK, flag::ACK, &link_header(index, false));
    if let Some(name) = name {
        message = message.with_name(link::NAME, name);
    }
    message = message.with_u32(link::MTU, mtu.into());
    if !silent || mtu < LEAST_MTU_OF_INET6 {
        return message;
    }
    message.nesting(link::OF_FAMILIES, |families| {
        families.nesting(INET6.into(), |inet6| inet6.with(link::INET6_ADDRESS_MODE, &[NONE]))
    })
}

/// Brings an interface up.
pub(super) fn bring_up(index: i32) -> Message {
    Message::new(kind::NEW_LINK, flag::ACK, &link_header(index, true))
}

/// Whether this namespace's kernel has IPv6 at all.
pub(super) fn knows_inet6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether an interface has IPv6 switched off.
fn is_without_inet6(interface: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    std::fs::read_to_string(path).map_or(true, |disabled| disabled.trim() != "0")
}

/// The messages for a guest whose devices stand for these interfaces, in this order.
pub(super) fn for_guest(kernel: &Kernel, wanted: &[Link]) -> Result<GuestMessages, Refusal> {
    let list = |what: &'static str, get, header: &[u8]| kernel.list(get, header).map_err(Refusal::step(what));
    let route_header = |family| [&[family], [0; ROUTE_BYTES - 1].as_slice()].concat();
    let addresses = list("list the container's addresses", GET_ADDRESS, &[0; ADDRESS_BYTES])?;
    let mut routes = list("list the container's routes", GET_ROUTE, &route_header(INET))?;
    if knows_inet6() {
        routes.extend(list("list the container's routes", GET_ROUTE, &route_header(INET6))?);
    }
    let neighbours = list("list the container's neighbours", GET_NEIGHBOUR, &[0; NEIGHBOUR_BYTES])?;
    let index = |host: i32| {
        let number = wanted.iter().position(|link| link.index == host)?;
        Some(FIRST_INDEX + number as i32)
    };
    let mut messages = GuestMessages::default();
    let mut then = Vec::new();
    for (number, link) in (0..).zip(wanted) {
        let index = FIRST_INDEX + number;
        // As the guest's kernel names it in the beginning.
        let moved = Message::new(kind::NEW_LINK, flag::ACK, &link_header(0, false))
            .with_name(link::NAME, &format!("eth{number}"))
            .with_u32(link::NEW_INDEX, index as u32);
        messages.links.extend(moved.into_bytes());
        then.push(configure(index, Some(&link.name), link.mtu, is_without_inet6(&link.name)));
        if link.is_up {
            then.push(bring_up(index));
        }
    }
    let failed = || Refusal::step("read the container's network");
    for told in &addresses {
        then.extend(address(told, index).map_err(failed())?);
    }
    // A gateway is reached by a route that is there.
    let mut far = Vec::new();
    for told in &routes {
        let Some((message, by_gateway)) = route(told, index)? else { continue };
        if by_gateway { far.push(message) } else { then.push(message) }
    }
    then.extend(far);
    for told in &neighbours {
        then.extend(neighbour(told, index).map_err(failed())?);
    }
    then.into_iter().for_each(|message| messages.network.extend(message.into_bytes()));
    Ok(messages)
}

const SET: u16 = flag::CREATE | flag::REPLACE | flag::ACK;

/// An address that somebody has given an interface (linux/if_addr.h).
fn address(told: &Told, index: impl Fn(i32) -> Option<i32>) -> io::Result<Option<Message>> {
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    const BROADCAST: u16 = 4;
    const FLAGS: u16 = 8;
    /// It was seen to be nobody else's already.
    const NO_DUPLICATE_CHECK: u32 = 0x02;
    const PERMANENT: u32 = 0x80;
    const NO_PREFIX_ROUTE: u32 = 0x200;
    const OF_LINK: u8 = 253;
    let [family, prefix, flags, scope, i0, i1, i2, i3] = told.header()?;
    let attributes = told.attributes(ADDRESS_BYTES);
    let flags = attributes.find_u32(FLAGS).unwrap_or(flags.into());
    let Some(index) = index(i32::from_ne_bytes([i0, i1, i2, i3])) else { return Ok(None) };
    let of_inet6 = family == INET6;
    // What a router has announced, and what follows from the MAC, comes to the guest by itself.
    if told.kind != NEW_ADDRESS || of_inet6 && (scope == OF_LINK || flags & PERMANENT == 0) {
        return Ok(None);
    }
    let header = [[family, prefix, 0, scope], index.to_ne_bytes()].concat();
    let kept = flags & NO_PREFIX_ROUTE | if of_inet6 { NO_DUPLICATE_CHECK } else { 0 };
    let message = Message::new(NEW_ADDRESS, SET, &header).with_u32(FLAGS, kept);
    Ok(Some(copied(message, attributes, &[ADDRESS, LOCAL, BROADCAST])))
}

/// A route that somebody has set, and whether it leads over a gateway.
fn route(told: &Told, index: impl Fn(i32) -> Option<i32>) -> Result<Option<(Message, bool)>, Refusal> {
    const DESTINATION: u16 = 1;
    const SOURCE: u16 = 2;
    const INTERFACE: u16 = 4;
    const GATEWAY: u16 = 5;
    const PRIORITY: u16 = 6;
    const PREFERRED_SOURCE: u16 = 7;
    const METRICS: u16 = 8;
    const CACHE_INFO: u16 = 12;
    const TABLE: u16 = 15;
    const VIA: u16 = 18;
    const PREFERENCE: u16 = 20;
    const EXPIRES: u16 = 23;
    const COPIED: [u16; 9] =
        [DESTINATION, SOURCE, GATEWAY, PRIORITY, PREFERRED_SOURCE, METRICS, TABLE, VIA, PREFERENCE];
    const MAIN: u32 = 254;
    const BY_KERNEL: u8 = 2;
    const BY_ROUTER: u8 = 9;
    const CLONED: u32 = 0x200;
    const ON_LINK: u32 = 4;
    let header = told.header::<ROUTE_BYTES>().map_err(Refusal::step("read the container's routes"))?;
    let [_, _, _, _, table, protocol, _, _, f0, f1, f2, f3] = header;
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    let attributes = told.attributes(ROUTE_BYTES);
    // The kernel makes those of its own tables and of addresses itself, in a guest too.
    if told.kind != NEW_ROUTE
        || attributes.find_u32(TABLE).unwrap_or(table.into()) != MAIN
        || matches!(protocol, BY_KERNEL | BY_ROUTER)
        || flags & CLONED != 0
    {
        return Ok(None);
    }
    let out = attributes.find_u32(INTERFACE);
    let out = match out.map(|out| index(out as i32)) {
        // By the loopback interface, or a tunnel that is down.
        Some(None) => return Ok(None),
        out => out.flatten(),
    };
    let ignored = [INTERFACE, CACHE_INFO, EXPIRES];
    let is_other = |(kind, _): &(u16, _)| !COPIED.contains(kind) && !ignored.contains(kind);
    let mut each = attributes;
    if let Some((other, _)) = each.find(is_other) {
        return Err(Refusal::new(format!(
            "its network namespace has a route with the attribute {other} (rtnetlink(7); 9 are several paths), which is \
             not passed on to a virtual machine; use plain routes, or cloche-container"
        )));
    }
    let header = [&header[..8], &(flags & ON_LINK).to_ne_bytes()].concat();
    let mut message = Message::new(NEW_ROUTE, SET, &header);
    if let Some(out) = out {
        message = message.with_u32(INTERFACE, out as u32);
    }
    let by_gateway = attributes.value(GATEWAY).or(attributes.value(VIA)).is_some();
    Ok(Some((copied(message, attributes, &COPIED), by_gateway)))
}

/// A neighbour that somebody has set (linux/neighbour.h).
fn neighbour(told: &Told, index: impl Fn(i32) -> Option<i32>) -> io::Result<Option<Message>> {
    const DESTINATION: u16 = 1;
    const LINK_ADDRESS: u16 = 2;
    const PERMANENT: u16 = 0x80;
    let [family, _, _, _, i0, i1, i2, i3, s0, s1, _, kind] = told.header::<NEIGHBOUR_BYTES>()?;
    let state = u16::from_ne_bytes([s0, s1]);
    let Some(index) = index(i32::from_ne_bytes([i0, i1, i2, i3])) else { return Ok(None) };
    if told.kind != NEW_NEIGHBOUR || state != PERMANENT || ![INET, INET6].contains(&family) {
        return Ok(None);
    }
    let header =
        [&[family, 0, 0, 0], index.to_ne_bytes().as_slice(), &state.to_ne_bytes(), &[0, kind]].concat();
    let message = Message::new(NEW_NEIGHBOUR, SET, &header);
    Ok(Some(copied(message, told.attributes(NEIGHBOUR_BYTES), &[DESTINATION, LINK_ADDRESS])))
}

/// A message with some of another one's attributes.
fn copied(message: Message, attributes: Attributes<'_>, kinds: &[u16]) -> Message {
    let wanted = attributes.filter(|(kind, _)| kinds.contains(kind));
    wanted.fold(message, |message, (kind, value)| message.with(kind, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel would tell of what the message sets.
    fn told(message: Message) -> Told {
        let mut told = Vec::new();
        super::super::netlink::take(&message.into_bytes(), &mut told).unwrap();
        told.remove(0)
    }

    fn index(host: i32) -> Option<i32> {
        (host == 7).then_some(16)
    }

    fn link_told(flags: u32) -> Told {
        let header = [[0; 4], 7_i32.to_ne_bytes(), flags.to_ne_bytes(), [0; 4]].concat();
        told(
            Message::new(kind::NEW_LINK, 0, &header)
                .with_name(link::NAME, "eth0")
                .with_u32(link::MTU, 1400)
                .with(link::ADDRESS, &[2, 0, 0, 0, 0, 9])
                .nesting(link::INFO, |info| info.with_name(link::INFO_KIND, "veth")),
        )
    }

    #[test]
    fn link_is_read() {
        let read = link(&link_told(link::UP)).unwrap();
        assert_eq!((read.index, read.name.as_str(), read.kind.as_str(), read.mtu), (7, "eth0", "veth", 1400));
        assert_eq!((read.address, read.is_up, read.is_loopback), ([2, 0, 0, 0, 0, 9], true, false));
        assert!(link(&link_told(link::LOOPBACK)).unwrap().is_loopback);
    }

    #[test]
    fn address_that_somebody_gave_is_repeated_for_the_guest() {
        let given = |family, scope, interface: i32, flags: u32| {
            let header = [[family, 24, 0, scope], interface.to_ne_bytes()].concat();
            told(
                Message::new(NEW_ADDRESS, 0, &header)
                    .with(1, &[10, 0, 0, 2])
                    .with(3, b"eth0\0")
                    .with_u32(8, flags),
            )
        };
        let repeated = told(address(&given(INET, 0, 7, 0x280), index).unwrap().unwrap());
        assert_eq!(repeated.header().unwrap(), [INET, 24, 0, 0, 16, 0, 0, 0]);
        let attributes = repeated.attributes(ADDRESS_BYTES);
        assert_eq!(attributes.value(1), Some(&[10, 0, 0, 2][..]));
        assert_eq!((attributes.find_u32(8), attributes.value(3)), (Some(0x200), None));
        let of_inet6 = told(address(&given(INET6, 0, 7, 0x80), index).unwrap().unwrap());
        assert_eq!(of_inet6.attributes(ADDRESS_BYTES).find_u32(8), Some(2));
        for other in [given(INET, 0, 1, 0x80), given(INET6, 253, 7, 0x80), given(INET6, 0, 7, 0)] {
            assert!(address(&other, index).unwrap().is_none());
        }
    }

    fn route_told(table: u8, protocol: u8, interface: u32) -> Message {
        let header = [INET, 0, 0, 0, table, protocol, 0, 1, 0x45, 0, 0, 0];
        Message::new(NEW_ROUTE, 0, &header).with_u32(4, interface).with_u32(15, table.into())
    }

    #[test]
    fn route_that_somebody_set_is_repeated_for_the_guest() {
        let gateway = route_told(254, 3, 7).with(5, &[10, 0, 0, 1]).with_u32(12, 0);
        let (message, by_gateway) = route(&told(gateway), index).unwrap().unwrap();
        let repeated = told(message);
        assert!(by_gateway);
        assert_eq!(repeated.header().unwrap(), [INET, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0]);
        let attributes = repeated.attributes(ROUTE_BYTES);
        assert_eq!((attributes.find_u32(4), attributes.value(5)), (Some(16), Some(&[10, 0, 0, 1][..])));
        assert_eq!(attributes.value(12), None);
        assert!(!route(&told(route_told(254, 4, 7)), index).unwrap().unwrap().1);
        for other in [route_told(255, 3, 7), route_told(254, 2, 7), route_told(254, 3, 1)] {
            assert!(route(&told(other), index).unwrap().is_none());
        }
    }

    #[test]
    fn route_of_a_kind_that_is_not_passed_on_is_refused() {
        let several = route_told(254, 3, 7).with(9, &[0; 8]);
        let refusal = route(&told(several), index).unwrap_err();
        assert!(refusal.message.contains("attribute 9"), "{}", refusal.message);
    }

    #[test]
    fn permanent_neighbour_is_repeated_for_the_guest() {
        let neighbour_told = |state: u16| {
            let header = [&[INET, 0, 0, 0, 7, 0, 0, 0], state.to_ne_bytes().as_slice(), &[0, 1]].concat();
            told(
                Message::new(NEW_NEIGHBOUR, 0, &header)
                    .with(1, &[10, 0, 0, 1])
                    .with(2, &[2; 6])
                    .with(3, &[0; 16]),
            )
        };
        let repeated = told(neighbour(&neighbour_told(0x80), index).unwrap().unwrap());
        assert_eq!(repeated.header().unwrap(), [INET, 0, 0, 0, 16, 0, 0, 0, 0x80, 0, 0, 1]);
        assert_eq!(repeated.attributes(NEIGHBOUR_BYTES).value(2), Some(&[2; 6][..]));
        assert!(neighbour(&neighbour_told(2), index).unwrap().is_none());
    }

    #[test]
    fn interface_that_is_not_to_speak_ipv6_is_told_so_where_it_could() {
        let message = told(configure(16, Some("eth0"), 1500, true));
        let families = message.attributes(LINK_BYTES).within(link::OF_FAMILIES);
        assert_eq!(families.within(INET6.into()).value(link::INET6_ADDRESS_MODE), Some(&[1][..]));
        for message in [configure(16, None, 1200, true), configure(16, None, 1500, false)] {
            assert_eq!(told(message).attributes(LINK_BYTES).value(link::OF_FAMILIES), None);
        }
    }
}
