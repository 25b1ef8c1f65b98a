"""The board with the terminal's progress: on the driver's node, back after it died, and no danger to who posts."""

from __future__ import annotations

import subprocess
import sys

# Two nodes; a task on the second one posts, which is what a training worker does. Ray itself would put an actor
# without CPUs anywhere.
SCRIPT = """
import os, signal, time
from pipelines.cluster.ray_session import DEFAULTS
os.environ.update(DEFAULTS)
import ray
from ray.cluster_utils import Cluster
from pipelines.cluster.board import Watch, post

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1, resources={"away": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
here = ray.get_runtime_context().get_node_id()
seen = []

def wait_for(value):
    deadline = time.monotonic() + 30
    while ("train", {"n": value}) not in seen and time.monotonic() < deadline:
        time.sleep(0.1)
        post(board, "train", {"n": value})

def where(board):
    return ray.get(board.__ray_call__.remote(lambda self: (ray.get_runtime_context().get_node_id(), os.getpid())))

@ray.remote(num_cpus=0, resources={"away": 1}, max_retries=0)
def posts(board):
    post(board, "train", {"n": 1})
    time.sleep(1)  # until it is sent

boards = [Watch(lambda *post: seen.append(post)) for _ in range(4)]
opened = [watch.__enter__() for watch in boards]
print("here", {where(board)[0] == here for board in opened})
for watch in boards[1:]:
    watch.__exit__()
board = opened[0]
ray.get(posts.remote(board))
cluster.remove_node(other, allow_graceful=False)
wait_for(2)
os.kill(where(board)[1], signal.SIGKILL)
wait_for(3)
print("seen", sorted({values["n"] for _, values in seen}))
boards[0].__exit__()
began = time.monotonic()
post(board, "train", {"n": 4})  # to a board that is gone
print("unharmed", time.monotonic() - began < 5)
ray.shutdown()
cluster.shutdown()
"""


def test_progress_outlives_lost_nodes_and_the_boards_own_death(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    told = [line for line in done.stdout.splitlines() if line.startswith(("here ", "seen ", "unharmed "))]
    assert told == ["here {True}", "seen [1, 2, 3]", "unharmed True"], done.stdout[-2000:] + done.stderr[-3000:]
