"""What is measured, and the marks that the results must reach. Plain data: imports nothing."""

from __future__ import annotations

ROWS = (1, 2, 16, 64, 256, 1024, 8192, 32768)
WIDTHS = (2048, 4096)
DTYPE = "bfloat16"

FAMILIES = {"mul": ("mul",), "add": ("add",), "glue": ("glue", "glue_nogate")}
"""Chains that are measured in one cell, by the cell's name."""

FAMILY = {chain: family for family, chains in FAMILIES.items() for chain in chains}

MODES = ("default", "max-autotune", "coordinate-descent")

DRAWS = 3
"""Compiles of an arm of the glue in a mode that tunes; the fastest of them counts."""

SHAPES = ("static", "dynamic-rows", "dynamic")
"""Which sizes are symbolic: none, the number of rows, or the width as well."""

NOISE = 1.03
"""Two times whose ratio is below this count as equal."""

GATE_COST_US = 0.6
GATE_COST_ROWS = 256
"""In the glue, in default mode, the gate costs at most so much at up to so many rows."""

IMPORT_MS = 50.0
"""``import gatefuse`` after ``import torch``."""
