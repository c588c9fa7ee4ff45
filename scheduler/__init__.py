"""What runs in each step: tokens, blocks, images to encode. Standard library alone.

Read `scheduler.py` first, then `request.py`, `step.py`, `state.py`, `planner.py`.
"""
