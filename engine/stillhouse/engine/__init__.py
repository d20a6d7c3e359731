"""The engine: a version directory in, tokens out. The same in the Triton backend and in the edge runner.

manifest, directory, policy, options    what build writes and everyone else reads
request, sampling, sampler, core        continuous batching over token ids
kv_cache, runner                        the graph and its memory
durable                                 writes that outlive a power cut
text, model                             the door where text becomes tokens and back
"""

import os

# ONNX Runtime would report its use and keep a device id in the cache folder; it reads this when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
