"""The daemon of one site: its configuration, certificates, control API, guests and jobs.

Owns the site's directory, the control socket and every process started for a guest or a handoff.
Never touches the bytes of a guest's memory or disk: those belong to `memory`, `disks` and `handoff`.
"""
