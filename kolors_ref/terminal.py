"""What the command lines say, whatever a file holds and whatever the terminal can show."""

import io
import sys


def one_line(message: object) -> str:
    """A message as one line; control characters, which a terminal would obey, are written out."""
    line = " ".join(str(message).split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def show_all_names() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes, instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
