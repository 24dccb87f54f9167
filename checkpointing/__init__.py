"""Checkpoints of a run: the files on disk, the state in them, saving in the background, resuming, and the run's folder.
Imports training_utils, distillation and what is below them; monitoring never.
"""
