"""The checks of doctor.py, generators that yield findings. Imports nothing: a Python without packages runs basics.py."""
