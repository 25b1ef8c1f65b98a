"""Forks ranks from a process that has imported what they need, which takes as long as the small training of a test.

Reads a line of JSON for each group of ranks, and prints their exit codes when all of them have ended.
"""

import json
import os
import runpy
import sys

from pipelines.worker import launch  # noqa: F401  (here and below: for the ranks)
from pipelines.worker.checkpoint import stored  # noqa: F401
from pipelines.worker.engine.deepspeed_import import import_deepspeed


def become(script: str, arguments: list[str], environment: dict[str, str], out: str, errors: str) -> None:
    """Runs the script in this process, as a new interpreter would."""
    for number, path in enumerate((os.devnull, out, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    import_deepspeed("cpu")
    for line in sys.stdin:
        processes = []
        for rank in json.loads(line):
            process = os.fork()
            if not process:
                become(**rank)
                return
            processes.append(process)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]), flush=True)


if __name__ == "__main__":
    main()
