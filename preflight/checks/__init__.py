"""The checks of doctor.py, generators of findings. Imports nothing: a Python without packages runs basics.py."""
