"""`python -m videoadapt` is the command `videoadapt`."""

from videoadapt.commands.cli import main

main()
