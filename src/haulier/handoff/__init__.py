"""One guest's way from one site to another: who owns it, in which order things happen, what is durable when.

Owns the journal, the ownership table and the worker processes of both sides.
Never touches QEMU, disks or sockets directly: it drives `guests`, `memory`, `disks` and `session`.
"""
