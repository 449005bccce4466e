"""Write the table of arguments and options of every verb into its page, from what `--help` says.

    python docs/verbs.py          # writes docs/verbs/*.md
    python docs/verbs.py --check  # exit code 1 if a page is not up to date

What stands above the line `## Arguments and options` is written by hand and stays.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

from autocompress import cli

FOLDER = Path(__file__).parent / "verbs"
LINE = "## Arguments and options"


def verbs() -> dict[str, Any]:
    """The commands of the program, by name."""
    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def table(command: Any) -> str:
    """Its parameters as Markdown."""
    rows = ["| name | what it is |", "| --- | --- |"]
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")] + list(parameter.secondary_opts)
        shown = ", ".join(f"`{name}`" for name in names) or f"`{parameter.metavar or parameter.name}`"
        rows.append(f"| {shown} | {described(parameter)} |")
    return "\n".join(rows)


def described(parameter: Any) -> str:
    """Its help on one line, with the default where the help does not say it."""
    said = re.sub(r"\s+", " ", parameter.help or "").strip()
    default = parameter.default
    plain = isinstance(default, int | float | str | Path) and not isinstance(default, bool)
    if plain and "default" not in said and not parameter.required:
        said += f" Default: {default}."
    return said.replace("|", "\\|").replace("[default:", "(default:").replace("]", ")")


def page(name: str, command: Any) -> str:
    """The page of a verb as it should be."""
    path = FOLDER / f"{name}.md"
    written = path.read_text(encoding="utf-8").split(LINE)[0].rstrip() if path.is_file() else f"# `{name}`"
    return f"{written}\n\n{LINE}\n\n{table(command)}\n"


def main() -> int:
    """Write or check all pages."""
    stale = []
    for name, command in verbs().items():
        path, wanted = FOLDER / f"{name}.md", page(name, command)
        if path.is_file() and path.read_text(encoding="utf-8") == wanted:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv:
            path.write_text(wanted, encoding="utf-8")
    print(f"{'not up to date' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
