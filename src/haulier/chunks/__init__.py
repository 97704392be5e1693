"""Chunks of disks: fingerprints, manifests, the store of packs, 4 KiB blocks and recipes, import of images.

Owns the store's directory (packs, index, locks) and nothing else on the machine.
Never touches a network, a guest or a running QEMU.
"""
