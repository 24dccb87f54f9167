"""Looks at a run and changes nothing in it: with or without what is in this folder, weights, data order and random
state are the same bit for bit. Rows and log lines, the bar, trackers, speed, health, layer maps, evaluation during
training. Imports checkpointing, evaluation, training_utils and what is below them.
"""
