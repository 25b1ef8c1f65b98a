"""Tab completion, in the shell that the script is for."""

import shutil
import subprocess

import pytest

from pipelines.cli import VERBS, main
from pipelines.commands.completion import SHELLS


def script(capsys, shell: str) -> str:
    assert main(["--print-completion", shell]) == 0
    return capsys.readouterr().out


def completions(source: str, line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    ask = f"""{source}
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
{"COMP_WORDS+=(''); COMP_CWORD=$((COMP_CWORD + 1))" if line.endswith(" ") else ""}
_tyro_medmamba medmamba; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash"], input=ask, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return [each.strip() for each in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("medmamba pro", ["promote"]),
        ("medmamba datasets ver", ["verify"]),
        ("medmamba shards quar", ["quarantine"]),
        ("medmamba train --train.optim.weight", ["--train.optim.weight-decay"]),
        ("medmamba status --js", ["--json"]),
    ],
)
def test_bash_completes_commands_and_their_options(line, offered, capsys):
    assert completions(script(capsys, "bash"), line) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_there_is_a_script_for_each_shell_with_every_command(shell, capsys):
    text = script(capsys, shell)
    assert all(name in text for name in VERBS)


@pytest.mark.parametrize("argv", [[], ["ksh"], ["bash", "zsh"]], ids=" ".join)
def test_another_shell_is_refused_with_those_that_there_are(argv, capsys):
    assert main(["--print-completion", *argv]) == 2
    assert capsys.readouterr().err.endswith("give one shell: bash, zsh, fish\n")
