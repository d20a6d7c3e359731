"""The OpenAI-compatible HTTP API and its page, over anything that generates.

generator.py      what the gateway speaks to: serve plugs Triton in, edge the engine itself
gateway.py        what all requests share: the generator, keys, counts
app.py            the HTTP application; doorway.py lets requests in (keys, draining), server.py runs it on
                  a port (address.py)
bodies.py, body.py, params.py     what a request says: its fields, its bytes, the engine's parameters made of it
chat.py, completions.py, models.py    the endpoints; messages.py, prompts.py: to token ids; job.py: n answers
answers.py, thoughts.py, logprobs.py, sse.py    from the engine's chunks to what a client gets
errors.py, metrics.py             every failure in OpenAI's shape; the Prometheus page
memory.py         what large bodies took goes back to the system
page/index.html   the page at `/`
"""
