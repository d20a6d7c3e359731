"""The engine: one version directory in, tokens out. Used unchanged by the Triton backend and by the edge runner.

manifest.py, directory.py, policy.py, options.py   what build writes and everyone else reads
request.py, sampling.py, scheduler.py, runner.py, core.py   continuous batching over token ids
text.py, model.py   the door where text becomes tokens and back
"""
