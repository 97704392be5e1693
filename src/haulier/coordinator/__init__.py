"""Who holds which chunk, and what the fleet consists of: sites, links, images, manifests, guests.

Owns the chunk index, its two back ends (SQLite, PostgreSQL), the service, its client, and the agents' reports to it.
Never touches a chunk store or a guest: what it says is a hint, and nothing is ever deleted on its word.
"""
