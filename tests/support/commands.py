"""What tests of commands ask: whether one failed as it should, and which files are there."""

from pathlib import Path

from dynlm.cli.main import main


def fails(capsys, arguments, *parts):
    """The command ends with code 2 and one line that holds ``parts``."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    message = lines[-1].split("\r")[-1]
    assert message.startswith("dynlm: ")
    for part in parts:
        assert part in message
    return message


def files(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
