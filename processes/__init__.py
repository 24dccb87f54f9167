"""Who is who among the ranks, which device is whose, how a process stops and with which code, and how all stop when one
does. Imports utils only.
"""
