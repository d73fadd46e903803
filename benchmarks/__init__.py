"""Benchmarks: a correctness gate first, then side by side in one process, printed as ratios.

python -m benchmarks               list them
python -m benchmarks whole_model   run one; --json FILE keeps the figures
"""
