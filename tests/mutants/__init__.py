"""Takes the guards out of the matcher and the rewriter, one at a time: does a test notice?

``python -m tests.mutants`` runs all of them; see its ``--help``.
"""
