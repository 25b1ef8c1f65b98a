"""The command `medmamba`: its verbs, help and exit codes.

Exit codes: 0 success, 1 failure, 2 usage error, 3 rejected by the gate.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from pydantic import ValidationError

from pipelines.cluster.stops import Paused
from pipelines.commands.bench import BENCH
from pipelines.commands.bytecode import keep_bytecode
from pipelines.commands.completion import SHELLS, print_completion
from pipelines.commands.datasets import DATASETS
from pipelines.commands.export import EXPORT
from pipelines.commands.predict import PREDICT
from pipelines.commands.promote import PROMOTE
from pipelines.commands.report import REPORT
from pipelines.commands.run import QUICKSTART, RUN
from pipelines.commands.shards.command import SHARDS
from pipelines.commands.status import STATUS
from pipelines.commands.step import EVALUATE, REGISTER, SHARD, TRAIN, TUNE
from pipelines.commands.submit import submit_command
from pipelines.console.arguments import HelpShown, UsageError
from pipelines.console.command import Command, check_name
from pipelines.console.renamed import in_new_words
from pipelines.console.terminal import show_log_visibly, visible
from pipelines.console.work_log import work_log
from pipelines.faults import fault_line
from pipelines.flow import DriftError, WorkflowError
from pipelines.interrupt import HAS_REPORTED, INTERRUPTED
from pipelines.override import ConfigError, explain
from pipelines.provenance import version
from pipelines.recipes import RECIPES

DONE, FAILED, WRONG_USE = 0, 1, 2
VERBS: dict[str, Command] = {
    each.name: each
    for each in (
        QUICKSTART,
        RUN,
        SHARD,
        TUNE,
        TRAIN,
        EVALUATE,
        REGISTER,
        PROMOTE,
        PREDICT,
        EXPORT,
        REPORT,
        STATUS,
        DATASETS,
        SHARDS,
        submit_command(lambda: VERBS),
        BENCH,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; a user's mistake is reported in one line, without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print_help()
        return DONE if argv else WRONG_USE
    if argv == ["--version"]:
        print(f"medmamba {version()}")
        return DONE
    keep_bytecode()
    show_log_visibly()
    logging.raiseExceptions = False  # a library that logs at exit would print a traceback after the last line
    return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        if argv[0] == "--print-completion":
            return _flushed(print_completion(VERBS.values(), argv[1:]))
        argv = in_new_words(argv)
        check_name(argv[0], VERBS)
        return _flushed(VERBS[argv[0]](argv[1:]))
    except ValidationError as error:
        return _report(explain(error), WRONG_USE)
    except (UsageError, ConfigError, DriftError) as error:
        return _report(error, WRONG_USE)
    except (ValueError, WorkflowError) as error:
        return _report(error, FAILED)
    except BrokenPipeError:
        return _closed_pipe()
    except HelpShown:
        return _flushed(DONE)
    except Paused as paused:
        return _report(paused, DONE)
    except (KeyboardInterrupt, SystemExit):  # ray.init turns SIGTERM into SystemExit, Ray Train does so with Ctrl-C
        return _report(INTERRUPTED, FAILED)
    except Exception as error:  # any error: the traceback goes to the log, the user gets one line
        return _unexpected(error)


def _print_help() -> None:
    print("medmamba: medical images in, a promoted model out\n")
    print("usage: medmamba VERB [options]     (details: medmamba VERB --help)\n")
    for name, verb in VERBS.items():
        print(f"  {name:<11} {verb.help}")
    print(f"\nrecipes: {', '.join(RECIPES)}")
    print("exit codes: 0 success, 1 failure, 2 usage error, 3 rejected by the gate")
    print("\nmedmamba --version prints the version. To set up tab completion for bash, once after each update:")
    print("  medmamba --print-completion bash > ~/.local/share/bash-completion/completions/medmamba")
    print(f"(that folder must exist; other shells: {', '.join(SHELLS[1:])})")


def _flushed(code: int) -> int:
    """Flushes standard output and returns `code`: nothing else notices a closed pipe after a help text."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    return code


def _closed_pipe() -> int:
    # The reader closed the pipe (`medmamba ... | head`). Python would report the error again when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _unexpected(error: Exception) -> int:
    with work_log(through=True) as log:
        log.write("".join(traceback.format_exception(error)))
        return _report(f"{fault_line(error)}{log.named()}", FAILED)


def _report(error: object, code: int) -> int:
    print(f"medmamba: {visible(str(error))}", file=sys.stderr, flush=True)
    HAS_REPORTED.set()
    return code
