"""`python -m flows`: the `titleshot` command, for programs that start it with the Python they run in."""

from flows.cli import main

main()
