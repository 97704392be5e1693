"""haulier hands running virtual machines and containers from one edge site to another over slow links.

Reading order: docs/index.md, docs/architecture.md, then the ``__init__`` of a package.
"""

__version__ = "0.1.0"
