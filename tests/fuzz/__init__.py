"""A fuzzer of the pass: random programs with gates, compiled with gatefuse and without.

``python -m tests.fuzz --cases 1000 --seed 0`` runs it; ``--case SEED:INDEX`` replays one program.

generate makes a case from a seed, out of steps and settings; programs and inputs are what it is
made of; inject writes into its graph. engines run it, judge compares, rounding says how far values
may differ. runner runs many, shrinking makes one that fails smaller.
"""
