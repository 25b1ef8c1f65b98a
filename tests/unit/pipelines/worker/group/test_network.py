"""Which interface the collectives of a training use, and where its ranks meet."""

import os
import socket

import psutil
import pytest

from pipelines.worker.group.network import INTERFACE_VARIABLES, NCCL_VARIABLE, bind_collectives, interface_of, listen_on

NAMES = (*INTERFACE_VARIABLES, NCCL_VARIABLE)
LOOPBACKS = {
    name for name, all_of_it in psutil.net_if_addrs().items() for each in all_of_it if each.address == "127.0.0.1"
}
ROUTABLE = [
    (name, each.address)
    for name, all_of_it in psutil.net_if_addrs().items()
    for each in all_of_it
    if each.family in (socket.AF_INET, socket.AF_INET6) and name not in LOOPBACKS
]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test leaves behind is taken back
        monkeypatch.delenv(name)


def chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_every_address_of_this_machine_is_found_on_its_interface():
    assert {interface_of("127.0.0.1")} == LOOPBACKS
    for name, address in ROUTABLE:
        assert interface_of(address) == name
        assert interface_of(address.partition("%")[0]) == name


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::1", "127.0.0.2"])
def test_an_address_on_no_interface_changes_nothing(address):
    assert interface_of(address) == ""
    bind_collectives(address)
    assert chosen() == {}


def test_on_loopback_nccl_is_bound_and_user_settings_stay(monkeypatch):
    (loopback,) = LOOPBACKS
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    bind_collectives("127.0.0.1")
    assert chosen() == {"GLOO_SOCKET_IFNAME": "mine", "TP_SOCKET_IFNAME": loopback, NCCL_VARIABLE: loopback}


@pytest.mark.skipif(not ROUTABLE, reason="this machine has loopback only")
def test_between_machines_nccl_finds_its_own_way():
    name, address = ROUTABLE[0]
    bind_collectives(address)
    assert chosen() == dict.fromkeys(INTERFACE_VARIABLES, name)


@pytest.mark.parametrize(("address", "host"), [("127.0.0.1", "127.0.0.1"), ("203.0.113.7", "0.0.0.0")])
def test_ranks_of_one_machine_meet_where_no_other_can_listen(address, host):
    with listen_on(address) as listening:
        assert listening.getsockname()[0] == host
        assert listening.getsockname()[1] > 0
