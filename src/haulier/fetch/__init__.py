"""Chunks from many places at once: which source is asked for what, and the connections over which they are asked.

Owns the scheduler (pure), the chunk service between sites, the object store origin, and the record of data left behind.
Never decides who owns a guest, never evicts or collects, and believes no byte that does not match its fingerprint.
"""
