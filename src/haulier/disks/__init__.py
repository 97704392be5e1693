"""A guest's disk at rest and on the move: the NBD export it boots from, the rounds of changes, the transfer.

Owns the export process, its sockets, and the messages of a disk transfer between two sites.
Never touches memory, the network session (it is given a `send`), or the life of a QEMU beyond its block layer.
"""
