"""Cache policies: which of the things that nothing refers to a site keeps, when not all of them fit.

Owns decisions and the books that they need; pure: time, sizes and costs are told, whoever asks does the deleting.
Never touches a store, a network or a clock.
"""
