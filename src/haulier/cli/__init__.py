"""The command line: one file a verb, each a thin layer over `agent.client`.

Owns words, tables and progress bars, and turns errors into exit codes.
Never touches guests, stores or the network itself.
"""

from haulier.cli.main import app, main

__all__ = ["app", "main"]
