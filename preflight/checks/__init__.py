"""The checks of doctor.py, from cheap to dear. Imports nothing here: basics.py runs on a Python without packages."""
