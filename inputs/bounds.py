"""The largest values of options that have no bound of their own: far above what a run can use, and small enough that no
sum or product of them overflows.
"""

STEPS = 10**12
MOST_LAYERS = 10_000
LONGEST_CONTEXT = 10_000_000  # tokens; more than any model has
MOST_SEED = 2**63 - 1  # torch, NumPy and Python all take it
