"""Will it work here, and will it fit? The plan behind --dry_run, and the checks of doctor.py. Imports everything but
the entries; this file and checks/__init__.py import nothing, because doctor.py starts on a Python without packages.
"""
