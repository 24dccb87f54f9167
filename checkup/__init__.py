"""The checks of doctor.py, from cheap to dear."""
