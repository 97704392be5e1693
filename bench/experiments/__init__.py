"""The published experiments, repeated: rows, checks and page (pure), and one module an experiment, which runs it.

Owns the shape of `bench/run seeds`' JSON and its page; measures by the functions of the other benchmarks.
"""
