"""What is special about distilling: which two models, the way to the teacher's answers, the losses, and AdamW on
float32 masters. Imports text, model_utils and what is below them.
"""
