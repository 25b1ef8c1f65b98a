"""Selects the network interface for collectives: the one that has the node's address.

By default gloo uses the address that the hostname resolves to. On many hosts that is 127.0.0.1, so ranks on different
nodes cannot reach each other ("connectFullMesh failed"). On others it is routable, so a training on a single machine
accepts connections from outside.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

# Read by gloo and by torch's TensorPipe.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"


def interface_of(address: str) -> str:
    """Name of this machine's interface with `address`; empty if none has it, for example behind a NAT."""
    wanted = _parsed(address)
    carried = ((name, each) for name, all_of_it in psutil.net_if_addrs().items() for each in all_of_it)
    families = (socket.AF_INET, socket.AF_INET6)
    return next((name for name, each in carried if each.family in families and _parsed(each.address) == wanted), "")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`."""
    return _parsed(address).is_loopback


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # link-local addresses carry a scope: fe80::1%eth0


def bind_collectives(address: str) -> None:
    """Makes this process's collectives use the interface with `address`, unless the user has set the variables.

    NCCL is only set for loopback: between machines it may find a better network (InfiniBand).
    """
    interface = interface_of(address)
    if not interface:
        return
    for name in (*INTERFACE_VARIABLES, *((NCCL_VARIABLE,) if is_loopback(address) else ())):
        os.environ.setdefault(name, interface)


def listen_on(address: str) -> socket.socket:
    """A listening socket on a free port: only on `address` if it is loopback, otherwise on all interfaces."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    host = address if is_loopback(address) else ""
    return socket.create_server((host, 0), family=family)
