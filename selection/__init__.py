"""Which of the teacher's layers a hybrid keeps, by measurement: what each head and each layer of the teacher does for
probes, what each of the student's layers costs in its place, and sets of layers that grow and shrink by what they
cost. Imports conversion, evaluation and what is below them.
"""
