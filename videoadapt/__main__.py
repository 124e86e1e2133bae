"""Makes `python -m videoadapt` the same as the command `videoadapt`."""

from videoadapt.commands.cli import main

main()
