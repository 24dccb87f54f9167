"""The page that report.py makes of a run's files. Imports arguments, inputs and utils only: drawing a page loads
neither torch nor transformers.
"""
