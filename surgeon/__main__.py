"""`python -m surgeon` is `surgeon`."""

from surgeon.app.cli import main

main()
