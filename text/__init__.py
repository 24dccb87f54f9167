"""Text to token ids to windows to batches, from a cache or as a stream, and every place in it that a run can resume at.
`batch.py` is what the rest of the project gets, and imports nothing of ours. The others import arguments and utils.
"""
