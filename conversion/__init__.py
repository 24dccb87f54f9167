"""A Llama becomes a student: its config, mixers computed in closed form from its attention, layer after layer, and the
figures of what was reached. Imports evaluation, text and what is below them; knows of no rank and of no run.
"""
