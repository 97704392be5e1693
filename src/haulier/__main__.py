"""``python -m haulier`` is the ``haulier`` command."""

from haulier.cli import main

main()
