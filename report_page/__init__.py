"""The page that report.py makes of a run's files. Imports neither torch nor transformers, nor any other folder: a
report opens on a laptop.
"""
