"""`make gpu-check`: does everything that is different on a GPU work there, and how fast is it? Starts every check as a
process of its own, since an error of CUDA leaves a process unusable, and writes a report. May import what preflight
may; the modules that the first process loads import no packages.
"""
