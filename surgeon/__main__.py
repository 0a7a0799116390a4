"""`python -m surgeon` is `surgeon`."""

from surgeon.cli import main

main()
