"""A fuzzer of the pass: random programs with gates, compiled with gatefuse and without.

``python -m tests.fuzz --cases 1000 --seed 0`` runs it; ``--case SEED:INDEX`` replays one program.

programs makes a program from a seed; inputs its tensors; engines compile and run it; judge
compares; statistics says what was covered.
"""
