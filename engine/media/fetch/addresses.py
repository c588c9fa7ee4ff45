"""Decide which IP addresses may be fetched from: only those of the public internet."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

# From IANA's registries of special-purpose addresses. `ipaddress.is_global` is not used, because
# its results differ between Python releases.
CLOSED_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; metadata service of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # public according to the registry; metadata service of one cloud
        "169.254.0.0/16",  # link-local; metadata service of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
OPEN_V6 = IPv6Network("2000::/3")  # all others are local, mapped, multicast or reserved
CLOSED_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, including Teredo
        "2001:db8::/32",
        "2002::/16",  # 6to4: contains an IPv4 address
        "3fff::/20",
    )
)
NAT64 = IPv6Network("64:ff9b::/96")  # the last 32 bits are the IPv4 address behind the gateway


def is_public(text: str) -> bool:
    """Return whether a resolved address is public; False for invalid ones and those with a zone."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in CLOSED_V4)
    return _is_public_v6(address)


def _is_public_v6(address: IPv6Address) -> bool:
    if address.scope_id is not None:
        return False
    if address in NAT64:  # how a host without IPv4 reaches servers without IPv6
        return is_public(str(IPv4Address(int(address) & 0xFFFFFFFF)))
    return address in OPEN_V6 and not any(address in network for network in CLOSED_V6)
