"""Which network interface the ranks of a training talk over: the one that carries their node's address.

Left alone, gloo takes the address that the host's own name resolves to. On many hosts that is 127.0.0.1, and then ranks
on different nodes cannot reach each other ("connectFullMesh failed"). On others it is a routable address, and then a
training on one machine listens to the outside.
"""

from __future__ import annotations

import ipaddress
import os
import socket

# What gloo and torch's TensorPipe read.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"


def interface_of(address: str) -> str:
    """The name of this machine's interface that carries `address`; empty where none does, as behind a NAT."""
    import psutil  # comes with DeepSpeed and, under another path, with Ray

    wanted = _parsed(address)
    carried = ((name, each) for name, all_of_it in psutil.net_if_addrs().items() for each in all_of_it)
    families = (socket.AF_INET, socket.AF_INET6)
    return next((name for name, each in carried if each.family in families and _parsed(each.address) == wanted), "")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`."""
    return _parsed(address).is_loopback


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # fe80::1%eth0 names its interface too


def bind_collectives(address: str) -> None:
    """Lets the collectives of this process use the interface that carries `address`; what the user has set stays.

    NCCL is told of loopback only: between machines it may have better than the interface of the address (InfiniBand).
    """
    interface = interface_of(address)
    if not interface:
        return
    for name in (*INTERFACE_VARIABLES, *((NCCL_VARIABLE,) if is_loopback(address) else ())):
        os.environ.setdefault(name, interface)


def listen_on(address: str) -> socket.socket:
    """A listening socket on a free port: on `address` alone where it is loopback, else on all interfaces."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    host = address if is_loopback(address) else ""
    return socket.create_server((host, 0), family=family)
