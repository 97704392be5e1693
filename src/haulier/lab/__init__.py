"""Sites as network namespaces with shaped links between them, on one machine, for demos, tests and benchmarks.

Owns: the namespaces, links, relays and files of the labs it brought up (and guest images and workloads for them).
Never touches: the host's own network (its interfaces, routes, firewall), or anything a lab did not make itself.
"""
