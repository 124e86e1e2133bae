"""`python -m videoadapt` is the command `videoadapt`."""

from videoadapt.cli import main

main()
