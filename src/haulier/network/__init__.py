"""Owns what haulier looks at and changes in a host's network: uplinks, MPTCP, tunnels, waypoints, leases, DHCP, relays.

It changes only what it made itself and notes what that is, so that it can be taken away again; it never touches an
interface, address or route of the operator's, and knows nothing of sessions, guests' insides or who owns a guest.
"""
