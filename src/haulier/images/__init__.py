"""Images in layers: base, application, and what a guest has beyond them; committing and distributing layers.

Owns which image lies on which, what a chunk belongs to, the making of an application layer, and pushing.
Never touches who owns a guest, nor how chunks are stored or sent.
"""
