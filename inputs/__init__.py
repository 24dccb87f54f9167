"""Checks what a user gives before it is used: options on a command line or in a file, and folders of models. Imports
nothing of the project but paths, utils and llamba.
"""
