"""What a user hands in, before it is trusted: options on a command line or in a file, and folders of models. Imports
utils and llamba only.
"""
