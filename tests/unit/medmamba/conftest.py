"""Fixtures for tests of networks."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small networks gain nothing from more threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
