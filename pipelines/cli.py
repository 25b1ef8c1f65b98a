"""The command `medmamba`: its verbs, help and exit codes.

Exit codes: 0 done, 2 wrong use, 3 a gate said no, 1 anything else.
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
from pipelines.commands.run import QUICKSTART, RUN
from pipelines.commands.shards.command import SHARDS
from pipelines.commands.status import STATUS
from pipelines.commands.step import EVALUATE, REGISTER, SHARD, TRAIN, TUNE
from pipelines.commands.submit import submit_command
from pipelines.console.arguments import HelpShown, UsageError
from pipelines.console.command import Command, check_name
from pipelines.console.terminal import show_log_visibly, visible
from pipelines.console.work_log import work_log
from pipelines.faults import fault_line
from pipelines.flow import DriftError, WorkflowError
from pipelines.interrupt import HAS_TOLD, INTERRUPTED
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
    logging.raiseExceptions = False  # a library that logs while the process ends would print after the last line
    return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        if argv[0] == "--print-completion":
            return _flushed(print_completion(VERBS.values(), argv[1:]))
        check_name(argv[0], VERBS)
        return _flushed(VERBS[argv[0]](argv[1:]))
    except ValidationError as error:
        return _tell(explain(error), WRONG_USE)
    except (UsageError, ConfigError, DriftError) as error:
        return _tell(error, WRONG_USE)
    except (ValueError, WorkflowError) as error:
        return _tell(error, FAILED)
    except BrokenPipeError:
        return _nobody_reads()
    except HelpShown:
        return _flushed(DONE)
    except Paused as paused:
        return _tell(paused, DONE)
    except (KeyboardInterrupt, SystemExit):  # ray.init turns SIGTERM into SystemExit, Ray Train a Ctrl-C
        return _tell(INTERRUPTED, FAILED)
    except Exception as error:  # the last boundary: the traceback is kept, the user gets a line
        return _unexpected(error)


def _print_help() -> None:
    print("medmamba: medical images in, a promoted model out\n")
    print("usage: medmamba VERB [options]     (medmamba VERB --help explains each)\n")
    for name, verb in VERBS.items():
        print(f"  {name:<11} {verb.help}")
    print(f"\nrecipes: {', '.join(RECIPES)}")
    print("exit codes: 0 done, 2 wrong use, 3 a gate said no, 1 anything else")
    print("\nmedmamba --version prints the version. Tab completion, for bash, once after each update:")
    print("  medmamba --print-completion bash > ~/.local/share/bash-completion/completions/medmamba")
    print(f"(that folder must exist; other shells: {', '.join(SHELLS[1:])})")


def _flushed(code: int) -> int:
    """`code`, once standard output has taken what was printed: after a help text nothing else would ask."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _nobody_reads()
    return code


def _nobody_reads() -> int:
    # `medmamba ... | head`: whoever read has enough. Python would complain once more when it flushes at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _unexpected(error: Exception) -> int:
    with work_log(through=True) as log:
        log.write("".join(traceback.format_exception(error)))
        return _tell(f"{fault_line(error)}{log.named()}", FAILED)


def _tell(error: object, code: int) -> int:
    print(f"medmamba: {visible(str(error))}", file=sys.stderr, flush=True)
    HAS_TOLD.set()
    return code
