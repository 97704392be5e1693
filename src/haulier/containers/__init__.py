"""Guests as containers: runc and CRIU, root file systems from chunks, network namespaces, memory of processes.

Owns the files below a guest's `container` directory, its network namespace and its control groups.
Never touches the network between sites, the journal or who owns a guest: callers decide when a container may run.
"""
