"""`python -m autocompress`."""

from autocompress.cli import main

main()
