"""`gatefuse bench`: is the fused gate right and faster on this machine? Two minutes, one table.

The laboratory in ``benchmarks/`` of a checkout measures with the same code.
"""
