"""The page that report.py makes of a run's files. Imports arguments, inputs and
utils only, and with them neither torch nor transformers.
"""
