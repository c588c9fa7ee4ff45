"""Step scheduling: tokens, KV blocks and images to encode. Standard library only.

Read `scheduler.py` first, then `request.py`, `step.py`, `state.py`, `planner.py`.
"""
