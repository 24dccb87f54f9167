"""Everything that eval_mmlu_hybrid.py does: questions, texts and tasks, scores, statistics, tables and the report.
Imports text, distillation, model_utils and the rooms below them; knows nothing of a training run.
"""
