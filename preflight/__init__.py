"""Will a run work here, and will it fit? The plan behind --dry_run, the checks of doctor.py, and `make gpu-check`. May
import everything but the entries. This file and checks/__init__.py import nothing: doctor.py starts on a Python without
packages.
"""
